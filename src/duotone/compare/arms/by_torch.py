"""PyTorch by itself: a plain loop, and automatic mixed precision as its documentation has it.

https://docs.pytorch.org/docs/stable/notes/amp_examples.html: autocast around the forward pass and the loss; for FP16
`scale(loss).backward()`, `unscale_` before clipping, `step`, `update`. The schedule advances after skipped steps too,
as it does there; torch's scaler tells nobody that it skipped, so that is seen by its scale going down.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from duotone.compare.arms.fused import fused_optimizer
from duotone.compare.arms.stepper import Assignment, Taken
from duotone.train import cosine_schedule


class PlainStepper:
    """Trains a model with any optimizer: `backward`, `clip_grad_norm_`, `step`.

    Attributes:
        model: on its device already.
        optimizer: of its parameters.

    Args:
        assignment: what it is built for.
        model: as above.
        optimizer: as above.
        autocast: the dtype that forward passes are cast to; None for the dtype the model has.
    """

    def __init__(
        self,
        assignment: Assignment,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._autocast, self._device = autocast, assignment.device
        self.model = model
        self.optimizer = optimizer
        self._task, self._settings = assignment.task, assignment.settings
        self._schedule = cosine_schedule(optimizer, assignment.settings)

    def forward(self, batch: Any) -> Tensor:
        """Return the loss."""
        with self.evaluating():
            return self._task.loss(self.model, batch) / self._settings.micro_batches

    def backward(self, loss: Tensor) -> None:
        """Add its gradients."""
        loss.backward()

    def update(self) -> Taken:
        """Clip, step, advance the schedule."""
        if self._settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)
        self.optimizer.step()
        self._schedule.step()
        self.optimizer.zero_grad()
        return Taken(skipped=False, loss_scale=1.0)

    def evaluating(self) -> AbstractContextManager[Any]:
        """Return autocast, or a context that does nothing."""
        return nullcontext() if self._autocast is None else torch.autocast(self._device.type, self._autocast)


class ScaledStepper:
    """Trains FP32 weights under FP16 autocast, with `torch.amp.GradScaler`.

    Attributes:
        model: as the task gave it.
        optimizer: torch's, fused.
    """

    def __init__(self, assignment: Assignment) -> None:
        self.model = assignment.task.model.to(assignment.device)
        self.optimizer = fused_optimizer(self.model, assignment.settings)
        self._task, self._settings = assignment.task, assignment.settings
        self._schedule = cosine_schedule(self.optimizer, assignment.settings)
        self._device = assignment.device
        self._scaler = torch.amp.GradScaler(self._device.type)
        self._one = torch.ones((), device=self._device)

    def forward(self, batch: Any) -> Tensor:
        """Return the loss, computed under autocast."""
        with self.evaluating():
            return self._task.loss(self.model, batch) / self._settings.micro_batches

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the scaled loss."""
        self._scaler.scale(loss).backward()

    def update(self) -> Taken:
        """Unscale, clip, step, update the scale, advance the schedule."""
        # a product with the scale tells it without waiting for the device, as get_scale() would
        before = self._scaler.scale(self._one)
        if self._settings.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._schedule.step()
        self.optimizer.zero_grad()
        return Taken(skipped=self._scaler.scale(self._one) < before, loss_scale=before)

    def evaluating(self) -> AbstractContextManager[Any]:
        """Return autocast."""
        return torch.autocast(self._device.type, torch.float16)


def fp32(assignment: Assignment) -> PlainStepper:
    """Return what trains in FP32."""
    model = assignment.task.model.to(assignment.device)
    return PlainStepper(assignment, model, fused_optimizer(model, assignment.settings))


def amp_bf16(assignment: Assignment) -> PlainStepper:
    """Return what trains under BF16 autocast."""
    model = assignment.task.model.to(assignment.device)
    return PlainStepper(assignment, model, fused_optimizer(model, assignment.settings), torch.bfloat16)


def amp_fp16(assignment: Assignment) -> ScaledStepper:
    """Return what trains under FP16 autocast, with a scaled loss."""
    return ScaledStepper(assignment)
