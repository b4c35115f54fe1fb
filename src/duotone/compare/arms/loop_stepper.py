"""The usual training loop as a stepper: forward, backward, clip, step, with what a library takes over in its place."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from duotone.compare.arms.stepper import Assignment, Update
from duotone.train import cosine_schedule


class LoopStepper:
    """Trains a model with any optimizer; the schedule advances after every step, skipped or not.

    Attributes:
        model: on its device already.
        optimizer: of its parameters.

    Args:
        assignment: what it is built for.
        model: as above.
        optimizer: as above.
        autocast: the dtype that forward passes are cast to; None for the dtype that the model has.
        backward: adds the gradients of a loss.
        clip: clips the gradients to a norm, which it is called with.
        step: updates the parameters, or skips.
        schedule: what advances the learning rate, by default the run's own.
        loss_scale: returns the scale of losses, as a tensor; None where they are not scaled. It goes down in a step
            that is skipped, which no library tells otherwise.
    """

    def __init__(
        self,
        assignment: Assignment,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        autocast: torch.dtype | None = None,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        clip: Callable[[float], Any] | None = None,
        step: Callable[[], Any] | None = None,
        schedule: Any = None,
        loss_scale: Callable[[], Tensor] | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._task, self._settings, self._device = assignment.task, assignment.settings, assignment.device
        self._autocast, self._loss_scale = autocast, loss_scale
        self._backward = backward
        self._clip = clip or (lambda norm: nn.utils.clip_grad_norm_(model.parameters(), norm))
        # first: a scheduler of torch replaces the optimizer's `step`, to see the order of calls
        self._schedule = schedule or cosine_schedule(optimizer, assignment.settings)
        self._step = step or optimizer.step

    def forward(self, batch: Any) -> Tensor:
        """Return the loss."""
        with self.evaluating():
            return self._task.loss(self.model, batch) / self._settings.micro_batches

    def backward(self, loss: Tensor) -> None:
        """Add its gradients."""
        self._backward(loss)

    def update(self) -> Update:
        """Clip, step, advance the schedule."""
        before = self._loss_scale() if self._loss_scale is not None else 1.0
        if self._settings.clip_norm is not None:
            self._clip(self._settings.clip_norm)
        self._step()
        self._schedule.step()
        self.optimizer.zero_grad()
        return Update(skipped=self._loss_scale() < before if self._loss_scale is not None else False, loss_scale=before)

    def evaluating(self) -> AbstractContextManager[Any]:
        """Return autocast, or a context that does nothing."""
        return nullcontext() if self._autocast is None else torch.autocast(self._device.type, self._autocast)
