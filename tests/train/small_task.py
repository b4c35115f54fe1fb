"""A task that trains in milliseconds, with dropout so that random states matter."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from duotone.train import Task
from duotone.train.task import evaluating


def small_task(
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None, batches_per_epoch: int = 3
) -> Task:
    """Return a regression whose epochs are shorter than most runs."""
    held_out = torch.linspace(-1, 1, 16).unsqueeze(1)
    model = nn.Sequential(nn.Linear(1, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 1))

    def error(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (model(x) - x.square()).square().mean()

    def batches(generator: torch.Generator) -> Iterator[torch.Tensor]:
        for _ in range(batches_per_epoch):
            yield torch.rand(8, 1, generator=generator) * 2 - 1

    def evaluate(model: nn.Module) -> dict[str, float]:
        with evaluating(model):
            return {"loss": error(model, held_out).item()}

    return Task(name="small", model=model, loss=loss or error, batches=batches, evaluate=evaluate)


def no_batches(generator: torch.Generator) -> Iterable[torch.Tensor]:
    return ()
