"""Lightning Fabric: `bf16-mixed` is autocast on FP32 weights, `bf16-true` is BF16 weights without masters.

https://lightning.ai/docs/fabric/stable/fundamentals/convert.html: `fabric.setup`, `fabric.backward`,
`fabric.clip_gradients`, which raises at an Inf or a NaN, and the optimizer's own step. Its `16-mixed` is left out: on a
CPU it becomes `bf16-mixed`, and on a GPU it does not clip with a fused optimizer.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor

from duotone.compare.arms.fused import fused_optimizer
from duotone.compare.arms.stepper import Assignment, Taken
from duotone.errors import NonFiniteLoss
from duotone.train import cosine_schedule


class FabricStepper:
    """Trains what `Fabric.setup` returns.

    Attributes:
        model: Fabric's module around the task's; attributes and methods are those of the task's.
        optimizer: torch's, which Fabric's goes around.
    """

    def __init__(self, assignment: Assignment, precision: Literal["bf16-mixed", "bf16-true"]) -> None:
        from lightning.fabric import Fabric  # pyright: ignore[reportMissingImports]
        from lightning.fabric.strategies.single_device import SingleDeviceStrategy  # pyright: ignore[reportMissingImports]

        # it announces its precision by one of them
        for name in ("lightning.fabric", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.WARNING)
        device = assignment.device
        # named, so that what the environment says of ranks does not choose another
        strategy = SingleDeviceStrategy(device)
        devices = 1 if device.type == "cpu" else [device.index or 0]
        self._fabric = Fabric(accelerator=device.type, devices=devices, strategy=strategy, precision=precision)
        self.optimizer = fused_optimizer(assignment.task.model, assignment.settings)
        self.model, self._optimizer = self._fabric.setup(assignment.task.model, self.optimizer)
        self._schedule = cosine_schedule(self.optimizer, assignment.settings)
        self._task, self._settings = assignment.task, assignment.settings

    def forward(self, batch: Any) -> Tensor:
        """Return the loss; Fabric's module casts inputs and gives FP32."""
        return self._task.loss(self.model, batch) / self._settings.micro_batches

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss."""
        self._fabric.backward(loss)

    def update(self) -> Taken:
        """Clip, step, advance the schedule."""
        if self._settings.clip_norm is not None:
            self._clip(self._settings.clip_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return Taken(skipped=False, loss_scale=1.0)

    def _clip(self, clip_norm: float) -> None:
        try:
            self._fabric.clip_gradients(self.model, self._optimizer, max_norm=clip_norm)
        except RuntimeError as error:
            # Fabric refuses where others go on with NaN: the same outcome
            if "non-finite" not in str(error):
                raise
            raise NonFiniteLoss("the norm of the gradients is not finite, and Fabric does not clip it") from error

    def evaluating(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing: Fabric's module casts by itself."""
        return nullcontext()


def bf16_mixed(assignment: Assignment) -> FabricStepper:
    """Return what trains with `precision="bf16-mixed"`."""
    return FabricStepper(assignment, "bf16-mixed")


def bf16_true(assignment: Assignment) -> FabricStepper:
    """Return what trains with `precision="bf16-true"`."""
    return FabricStepper(assignment, "bf16-true")
