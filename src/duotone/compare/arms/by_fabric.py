"""Lightning Fabric: `bf16-mixed` is autocast on FP32 weights, `bf16-true` is BF16 weights without masters.

https://lightning.ai/docs/fabric/stable/fundamentals/convert.html: `fabric.setup`, `fabric.backward`,
`fabric.clip_gradients`, which raises at an Inf or a NaN, and the optimizer's own step. Its `16-mixed` is left out: on a
CPU it becomes `bf16-mixed`, and on a GPU it does not clip with a fused optimizer.
"""

import logging
from typing import Literal

from duotone.compare.arms.fused import fused_optimizer
from duotone.compare.arms.loop_stepper import LoopStepper
from duotone.compare.arms.stepper import Assignment
from duotone.errors import NonFiniteLoss


def bf16_mixed(assignment: Assignment) -> LoopStepper:
    """Return what trains with `precision="bf16-mixed"`."""
    return _set_up(assignment, "bf16-mixed")


def bf16_true(assignment: Assignment) -> LoopStepper:
    """Return what trains with `precision="bf16-true"`."""
    return _set_up(assignment, "bf16-true")


def _set_up(assignment: Assignment, precision: Literal["bf16-mixed", "bf16-true"]) -> LoopStepper:
    from lightning.fabric import Fabric  # pyright: ignore[reportMissingImports]
    from lightning.fabric.strategies.single_device import SingleDeviceStrategy  # pyright: ignore[reportMissingImports]

    # it announces its precision by one of them
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    device = assignment.device
    # named, so that what the environment says of ranks does not choose another
    strategy = SingleDeviceStrategy(device)
    devices = 1 if device.type == "cpu" else [device.index or 0]
    fabric = Fabric(accelerator=device.type, devices=devices, strategy=strategy, precision=precision)
    # the optimizer whose state counts is torch's, which Fabric's wraps
    optimizer = fused_optimizer(assignment.task.model, assignment.settings)
    model, wrapped = fabric.setup(assignment.task.model, optimizer)

    def clip(norm: float) -> None:
        try:
            fabric.clip_gradients(model, wrapped, max_norm=norm)
        except RuntimeError as error:
            # Fabric refuses where others go on with NaN: the same outcome
            if "non-finite" not in str(error):
                raise
            raise NonFiniteLoss("the norm of the gradients is not finite, and Fabric does not clip it") from error

    return LoopStepper(assignment, model, optimizer, backward=fabric.backward, clip=clip, step=wrapped.step)
