"""What every arm of a comparison has in common: a step in three parts, whichever library takes it.

A stepper trains one model in one way, written as that way's own documentation has it. Its caller draws the batches,
times the parts and records what they return.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from duotone.compare.arms.catalogue import Arm
from duotone.train import RunSettings, Task


@dataclass(frozen=True)
class Assignment:
    """What a stepper is built for.

    Attributes:
        arm: which it is.
        task: its model is fresh, in FP32, and on the CPU; the stepper may change it in place.
        settings: of the run: optimizer, learning rates, clipping, steps and micro-batches.
        device: where to train.
    """

    arm: Arm
    task: Task
    settings: RunSettings
    device: torch.device


@dataclass(frozen=True)
class Update:
    """What an update came to; tensors stay on the device, so that reading waits for nothing before its time.

    Attributes:
        skipped: whether the update was left out because of an overflow.
        loss_scale: that the gradients carried; 1 where losses are not scaled.
    """

    skipped: Tensor | bool
    loss_scale: Tensor | float


class Stepper(Protocol):
    """Trains a model, one optimizer step at a time.

    Attributes:
        model: what the task's functions are called with.
        optimizer: whose state counts as memory.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def forward(self, batch: Any) -> Tensor:
        """Return a task's loss for a micro-batch on the device: a scalar that is divided by their number already."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled if the arm scales."""
        ...

    def update(self) -> Update:
        """Unscale, clip, update, advance the schedule and zero the gradients."""
        ...

    def evaluating(self) -> AbstractContextManager[Any]:
        """Return what the task's evaluation runs in: autocast, for those that train in it."""
        ...
