"""Two steps of an arm on a tiny model, so that what a process loads once is there before memory is counted.

That is libraries, compiled kernels, threads and workspaces: hundreds of megabytes, whatever the model.
"""

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from duotone.compare.arms.catalogue import Arm
from duotone.compare.measuring.arm_trainer import ArmTrainer
from duotone.train import RunSettings, Task


def warm_up_process(arm: Arm, settings: RunSettings, device: torch.device) -> None:
    """Train a little and discard it. An error is ignored, as the real training raises it too; warnings come here."""
    with suppress(Exception):
        trainer = ArmTrainer(arm, _task(), settings, device)
        for _ in range(2):
            for _ in range(settings.micro_batches):
                trainer.stepper.backward(trainer.stepper.forward(trainer.batch()))
            trainer.stepper.update()


def _task() -> Task:
    model = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 16))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x).float().square().mean()

    def batches(generator: torch.Generator) -> Iterator[Tensor]:
        yield torch.rand(32, 16, generator=generator)

    return Task("warm-up", model, loss, batches, evaluate=lambda model: {"loss": 0.0})
