"""Hugging Face Accelerate: FP32 weights under its autocast, in FP16 with its loss scaler.

https://huggingface.co/docs/accelerate/basic_tutorials/migration: everything goes through `prepare`, then
`accelerator.backward`, `accelerator.clip_grad_norm_`, and the prepared optimizer and schedule step. The optimizer is
torch's fused one, with which Accelerate does not see that a step was skipped: its schedule advances all the same, and
the skip is read off the scale. Micro-batches are accumulated by hand, their losses being divided already.
"""

from typing import Literal

import torch

from duotone.compare.arms.fused import fused_optimizer
from duotone.compare.arms.loop_stepper import LoopStepper
from duotone.compare.arms.stepper import Assignment
from duotone.errors import ArmError
from duotone.train import cosine_schedule


def bf16(assignment: Assignment) -> LoopStepper:
    """Return what trains with `mixed_precision="bf16"`."""
    return _prepared(assignment, "bf16")


def fp16(assignment: Assignment) -> LoopStepper:
    """Return what trains with `mixed_precision="fp16"`.

    Raises:
        ArmError: on a CPU, where Accelerate trains in FP32 then, and does not say so.
    """
    if assignment.device.type == "cpu":
        raise ArmError("Accelerate has no FP16 on a CPU, it trains in FP32 there; compare with accelerate-bf16")
    return _prepared(assignment, "fp16")


def _prepared(assignment: Assignment, precision: Literal["bf16", "fp16"]) -> LoopStepper:
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

    task, settings, device = assignment.task, assignment.settings, assignment.device
    if device.index is not None:
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    # the optimizer whose state counts is torch's, which Accelerate's wraps
    optimizer = fused_optimizer(task.model, settings)
    model, prepared, schedule = accelerator.prepare(task.model, optimizer, cosine_schedule(optimizer, settings))
    scaler, one = accelerator.scaler, torch.ones((), device=device)
    return LoopStepper(
        assignment,
        model,
        optimizer,
        backward=accelerator.backward,
        clip=lambda norm: accelerator.clip_grad_norm_(model.parameters(), norm),
        step=prepared.step,
        schedule=schedule,
        loss_scale=None if scaler is None else lambda: scaler.scale(one),
    )
