"""A small cast model, optimizers with masters, and gradients by seed, for tests of weights that others change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.torch.parameters import shards

MARKS = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:this CPU has no FP16"),
    pytest.mark.filterwarnings("ignore:the model's policy scales the loss"),
]
every_policy = pytest.mark.parametrize("policy", ["bf16", "fp16"])

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda params: dt.AdamW(params, lr=1e-3),
    "AdamW, reference": lambda params: dt.AdamW(params, lr=1e-3, backend="reference"),
    "SGD": lambda params: dt.SGD(params, lr=1e-2),
    "Lion": lambda params: dt.Lion(params, lr=1e-3),
    "MasterWeights": lambda params: dt.MasterWeights(torch.optim.SGD(params, lr=1e-2)),
}


def make(policy: str, width: int, hidden: int, *, shard: bool = False) -> nn.Sequential:
    """Return two layers, three parameters, always with the same masters."""
    torch.manual_seed(0)
    model = dt.cast(nn.Sequential(nn.Linear(width, hidden), nn.Linear(hidden, 1, bias=False)), policy)
    return dt.fully_shard(model) if shard else model


def give_gradients(model: nn.Module, seed: int) -> None:
    """Set gradients that depend on the seed alone, of a sharded model this rank's parts."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = shards.cut(torch.randn(param.shape, generator=generator).to(param.grad_dtype), param)
