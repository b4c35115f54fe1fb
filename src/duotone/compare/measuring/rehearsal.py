"""One step of an arm on a model of a few weights, so that what a process needs once is there before memory is counted.

That is libraries, compiled kernels, threads and workspaces: hundreds of megabytes that no larger model adds to.
"""

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from duotone.compare.arms.catalogue import Arm
from duotone.compare.measuring.course import Course
from duotone.train import RunSettings, Task


def rehearse(arm: Arm, settings: RunSettings, device: torch.device) -> None:
    """Train a little and forget it; what fails is told by the real thing, what is warned of once, here."""
    with suppress(Exception):
        course = Course(arm, _task(), settings, device)
        for _ in range(2):
            for _ in range(settings.micro_batches):
                course.stepper.backward(course.stepper.forward(course.batch()))
            course.stepper.update()


def _task() -> Task:
    model = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 16))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x).float().square().mean()

    def batches(generator: torch.Generator) -> Iterator[Tensor]:
        yield torch.rand(32, 16, generator=generator)

    return Task("rehearsal", model, loss, batches, evaluate=lambda model: {"loss": 0.0})
