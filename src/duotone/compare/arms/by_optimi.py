"""optimi: BF16 weights whose rounding errors are kept by Kahan summation, in BF16 too.

https://optimi.benjaminwarner.dev/kahan_summation: the model in BF16, and an optimizer of optimi's, which adds the
compensation by itself. 10 bytes per parameter with AdamW: weight 2, gradient 2, two BF16 moments 4, compensation 2. Its
AdamW has an eps of 1e-6 by default, the others 1e-8; that stays as it is.
"""

from typing import Any

import torch
from torch import nn

from duotone.compare.arms.by_torch import PlainStepper
from duotone.compare.arms.stepper import Assignment
from duotone.compare.arms.whole_bfloat16 import whole_bfloat16
from duotone.train import RunSettings


def build(assignment: Assignment) -> PlainStepper:
    """Return what trains with optimi."""
    model = whole_bfloat16(assignment.task.model, assignment.device)
    return PlainStepper(assignment, model, _optimizer(model, assignment.settings))


def _optimizer(model: nn.Module, settings: RunSettings) -> torch.optim.Optimizer:
    import optimi  # pyright: ignore[reportMissingImports]

    common: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    match settings.optimizer:
        case "adamw":
            return optimi.AdamW(model.parameters(), betas=settings.betas, **common)
        case "lion":
            return optimi.Lion(model.parameters(), betas=settings.betas, **common)
        case "sgd":
            return optimi.SGD(model.parameters(), momentum=settings.momentum, **common)
