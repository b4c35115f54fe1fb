"""A task file that trains in a fraction of a millisecond, with dropout so that random states matter."""

from collections.abc import Iterator

import torch
from torch import nn

from duotone.train import Task
from duotone.train.task import evaluating

SETTINGS = {"steps": 40, "learning_rate": 1e-2, "warmup_steps": 4}


def task() -> Task:
    """Return a regression whose epochs have three batches."""
    held_out = torch.linspace(-1, 1, 16).unsqueeze(1)
    model = nn.Sequential(nn.Linear(1, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 1))

    def error(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (model(x) - x.square()).square().mean()

    def batches(generator: torch.Generator) -> Iterator[torch.Tensor]:
        for _ in range(3):
            yield torch.rand(8, 1, generator=generator) * 2 - 1

    def evaluate(model: nn.Module) -> dict[str, float]:
        with evaluating(model):
            return {"loss": error(model, held_out).item()}

    return Task("tiny", model, error, batches, evaluate, settings=SETTINGS, facts={"held out": "16 numbers"})
