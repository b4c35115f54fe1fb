"""A task of your own: which of two spirals a point lies on. Run it with `duotone train examples/own_task.py`.

A task file defines `task()`, which returns a `Task`: a model in FP32, its loss, one epoch of batches
drawn from the generator it is given, and an evaluation. It says nothing about precision or devices.
"""

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from duotone.train import Task


def spirals(points: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw points in the plane (points, 2) and the spiral each belongs to (points,), 0 or 1."""
    spiral = torch.randint(2, (points,), generator=generator)
    turn = torch.rand(points, generator=generator)
    angle = 3 * math.pi * turn + math.pi * spiral
    noise = 0.02 * torch.randn(points, 2, generator=generator)
    return turn[:, None] * torch.stack((angle.cos(), angle.sin()), dim=1) + noise, spiral


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    points, spiral = batch
    return F.cross_entropy(model(points).float(), spiral)


def batches(generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for _ in range(100):
        yield spirals(128, generator)


def evaluate(model: nn.Module) -> Mapping[str, float]:
    points, spiral = spirals(2000, torch.Generator().manual_seed(2**40))
    with torch.inference_mode():
        logits = model(points.to(next(model.parameters()).device)).float().cpu()
    return {
        "loss": F.cross_entropy(logits, spiral).item(),
        "accuracy": (logits.argmax(1) == spiral).float().mean().item(),
    }


def task() -> Task:
    return Task(
        name="two spirals",
        model=nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2)),
        loss=loss,
        batches=batches,
        evaluate=evaluate,
        settings={"steps": 1500, "learning_rate": 3e-3, "warmup_steps": 50},
        baselines={"a coin": math.log(2)},
        facts={"points": "drawn afresh for every batch; 2000 others held out"},
    )
