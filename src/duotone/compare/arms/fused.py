"""torch's own optimizers, in their fused form: one pass over each tensor, on CPUs and on GPUs."""

import torch
from torch import nn

from duotone.errors import ArmError
from duotone.train import RunSettings


def fused_optimizer(model: nn.Module, settings: RunSettings) -> torch.optim.Optimizer:
    """Return the optimizer that settings ask for, from torch.

    Raises:
        ArmError: torch has none of that name.

    >>> fused_optimizer(nn.Linear(2, 2), RunSettings(optimizer="sgd")).defaults["momentum"]
    0.9
    """
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": True}
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(model.parameters(), betas=settings.betas, **common)
        case "sgd":
            return torch.optim.SGD(model.parameters(), momentum=settings.momentum, **common)
        case other:
            raise ArmError(f'torch has no optimizer "{other}"; compare with --optimizer adamw or sgd')
