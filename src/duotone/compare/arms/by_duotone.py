"""Duotone, under the arm's policy: the loop that its README begins with."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

import duotone.torch as dt
from duotone.compare.arms.stepper import Assignment, Update
from duotone.errors import ArmError
from duotone.train import cosine_schedule, optimizer_of


class DuotoneStepper:
    """Trains a cast model with Duotone's optimizer and loss scaler; a skipped step holds the schedule.

    Attributes:
        model: cast, in place.
        optimizer: Duotone's.
    """

    def __init__(self, assignment: Assignment, policy: str) -> None:
        self.model = dt.cast(assignment.task.model.to(assignment.device), policy)
        self.optimizer = optimizer_of(self.model, assignment.settings)
        self._task, self._settings = assignment.task, assignment.settings
        self._schedule = cosine_schedule(self.optimizer, assignment.settings)
        self._scaler = dt.LossScaler(policy)

    def forward(self, batch: Any) -> Tensor:
        """Return the loss."""
        return self._task.loss(self.model, batch) / self._settings.micro_batches

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the scaled loss."""
        self._scaler.backward(loss)

    def update(self) -> Update:
        """Unscale, clip, update or skip, in one step."""
        report = self._scaler.step(self.optimizer, clip_norm=self._settings.clip_norm, scheduler=self._schedule)
        self.optimizer.zero_grad()
        return Update(skipped=report.skipped, loss_scale=report.loss_scale)

    def evaluating(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing: a cast model casts by itself."""
        return nullcontext()


def build(assignment: Assignment) -> DuotoneStepper:
    """Return what trains under the arm's policy.

    Raises:
        PolicyError: the policy cannot be read, or the model not be cast.
    """
    if assignment.arm.policy is None:
        raise ArmError(f'arm "{assignment.arm.name}" has no policy; give it one, such as bf16')
    return DuotoneStepper(assignment, assignment.arm.policy)
