"""PyTorch by itself: a plain loop, and automatic mixed precision as its documentation has it.

https://docs.pytorch.org/docs/stable/notes/amp_examples.html: autocast around the forward pass and the loss; for FP16
`scale(loss).backward()`, `unscale_` before clipping, `step`, `update`. The schedule advances after skipped steps too,
as it does there.
"""

import torch
from torch import nn

from duotone.compare.arms.fused import fused_optimizer
from duotone.compare.arms.loop_stepper import LoopStepper
from duotone.compare.arms.stepper import Assignment


def fp32(assignment: Assignment, autocast: torch.dtype | None = None) -> LoopStepper:
    """Return what trains in FP32, under autocast if a dtype is given."""
    model = assignment.task.model.to(assignment.device)
    return LoopStepper(assignment, model, fused_optimizer(model, assignment.settings), autocast=autocast)


def amp_bf16(assignment: Assignment) -> LoopStepper:
    """Return what trains under BF16 autocast."""
    return fp32(assignment, torch.bfloat16)


def amp_fp16(assignment: Assignment) -> LoopStepper:
    """Return what trains under FP16 autocast, with `torch.amp.GradScaler`."""
    model = assignment.task.model.to(assignment.device)
    optimizer = fused_optimizer(model, assignment.settings)
    scaler = torch.amp.GradScaler(assignment.device.type)
    one = torch.ones((), device=assignment.device)

    def clip(norm: float) -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), norm)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return LoopStepper(
        assignment,
        model,
        optimizer,
        autocast=torch.float16,
        backward=lambda loss: scaler.scale(loss).backward(),
        clip=clip,
        step=step,
        # a product with the scale tells it without waiting for the device, as get_scale() would
        loss_scale=lambda: scaler.scale(one),
    )
