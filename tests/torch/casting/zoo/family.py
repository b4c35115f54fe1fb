"""What a family of the zoo is: its models, their batches and their losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

import duotone.torch as dt

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Family:
    """One kind of model and a small problem that it learns.

    Attributes:
        build: makes the models, one for each loss; a GAN is two.
        batch: draws a batch.
        losses: each is called with all models and a batch, and trains the model at its place.
        learning_rate: of every optimizer.
        steps: how many times each model is updated.
        optimizer: a class of `duotone.torch`.
        settings: its further settings.
        score: what must fall, if it is not the first loss.
    """

    build: Callable[[], tuple[nn.Module, ...]]
    batch: Callable[[Generator], Batch]
    losses: tuple[Callable[..., Tensor], ...]
    learning_rate: float
    steps: int = 40
    optimizer: type[torch.optim.Optimizer] = dt.AdamW
    settings: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[..., Tensor] | None = None
