"""Hugging Face Accelerate: FP32 weights under its autocast, in FP16 with its loss scaler.

https://huggingface.co/docs/accelerate/basic_tutorials/migration: everything goes through `prepare`, then
`accelerator.backward`, `accelerator.clip_grad_norm_`, and the prepared optimizer and schedule step. The optimizer is
torch's fused one, with which Accelerate does not see that a step was skipped: its schedule advances all the same, and
the skip is read off the scale. Micro-batches are accumulated by hand, their losses being divided already.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from duotone.compare.arms.fused import fused_optimizer
from duotone.compare.arms.stepper import Assignment, Taken
from duotone.errors import ArmError
from duotone.train import cosine_schedule


class AccelerateStepper:
    """Trains what `Accelerator.prepare` returns.

    Attributes:
        model: the task's own, whose `forward` Accelerate has replaced.
        optimizer: torch's, which Accelerate's goes around.
    """

    def __init__(self, assignment: Assignment, precision: Literal["bf16", "fp16"]) -> None:
        from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

        device = assignment.device
        if device.index is not None:
            torch.cuda.set_device(device)
        self._accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        self.optimizer = fused_optimizer(assignment.task.model, assignment.settings)
        self.model, self._optimizer, self._schedule = self._accelerator.prepare(
            assignment.task.model, self.optimizer, cosine_schedule(self.optimizer, assignment.settings)
        )
        self._task, self._settings = assignment.task, assignment.settings
        self._one = torch.ones((), device=device)

    def forward(self, batch: Any) -> Tensor:
        """Return the loss; the model runs under autocast and gives FP32."""
        return self._task.loss(self.model, batch) / self._settings.micro_batches

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss, which Accelerate scales."""
        self._accelerator.backward(loss)

    def update(self) -> Taken:
        """Unscale, clip, step, advance the schedule."""
        before = self._loss_scale()
        if self._settings.clip_norm is not None:
            self._accelerator.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return Taken(skipped=self._loss_scale() < before, loss_scale=before)

    def evaluating(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing: a prepared model casts by itself."""
        return nullcontext()

    def _loss_scale(self) -> Tensor:
        scaler = self._accelerator.scaler
        return self._one if scaler is None else scaler.scale(self._one)


def bf16(assignment: Assignment) -> AccelerateStepper:
    """Return what trains with `mixed_precision="bf16"`."""
    return AccelerateStepper(assignment, "bf16")


def fp16(assignment: Assignment) -> AccelerateStepper:
    """Return what trains with `mixed_precision="fp16"`.

    Raises:
        ArmError: on a CPU, where Accelerate trains in FP32 then, and does not say so.
    """
    if assignment.device.type == "cpu":
        raise ArmError("Accelerate has no FP16 on a CPU, it trains in FP32 there; compare with accelerate-bf16")
    return AccelerateStepper(assignment, "fp16")
