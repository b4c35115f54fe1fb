"""The optimizer that a run's settings ask for, one of Duotone's."""

from typing import Any

import torch
from torch import nn

import duotone.torch as dt
from duotone.run_settings import RunSettings


def optimizer_of(model: nn.Module, settings: RunSettings) -> torch.optim.Optimizer:
    """Return the optimizer of a cast model's parameters; where parameters are to be sharded, build it after that.

    >>> type(optimizer_of(nn.Linear(2, 2), RunSettings(optimizer="lion"))).__name__
    'Lion'
    """
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "seed": settings.seed,
        "backend": settings.backend,
    }
    match settings.optimizer:
        case "adamw":
            return dt.AdamW(model.parameters(), betas=settings.betas, **common)
        case "lion":
            return dt.Lion(model.parameters(), betas=settings.betas, **common)
        case "sgd":
            return dt.SGD(model.parameters(), momentum=settings.momentum, **common)
