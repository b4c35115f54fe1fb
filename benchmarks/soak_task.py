"""What `soak.py` trains: a regression in milliseconds per step whose every random state matters.

Dropout draws from torch's global state, the noise from NumPy's, and the steps that overflow in FP16 from Python's.
"""

import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from duotone.train import Task
from duotone.train.task import evaluating


def _error(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x).float() - x.square().float()).square().mean()


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    noise = torch.from_numpy(np.random.standard_normal(x.shape)).to(x)
    # one step in fifty is so large that FP16 overflows, until the loss scale has come down by halves
    factor = 1e4 if random.random() < 0.02 else 1.0
    return _error(model, x + 0.01 * noise) * factor


def batches(generator: torch.Generator) -> Iterator[torch.Tensor]:
    for _ in range(37):
        yield torch.rand(16, 8, generator=generator) * 2 - 1


def evaluate(model: nn.Module) -> Mapping[str, float]:
    with evaluating(model):
        return {"loss": _error(model, torch.linspace(-1, 1, 128).reshape(16, 8)).item()}


def task() -> Task:
    layers = [nn.Linear(8, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8)]
    return Task(name="soak", model=nn.Sequential(*layers), loss=loss, batches=batches, evaluate=evaluate)
