"""torch's own optimizers, in their fused form: one pass over each tensor, on CPUs and on GPUs."""

import torch
from torch import nn

from duotone.errors import ArmError
from duotone.train import RunSettings, optimizer_arguments


def fused_optimizer(model: nn.Module, settings: RunSettings) -> torch.optim.Optimizer:
    """Return the optimizer that settings ask for, from torch.

    Raises:
        ArmError: torch has none of that name.

    >>> fused_optimizer(nn.Linear(2, 2), RunSettings(optimizer="sgd")).defaults["momentum"]
    0.9
    """
    classes = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    if settings.optimizer not in classes:
        raise ArmError(f'torch has no optimizer "{settings.optimizer}"; compare with --optimizer adamw or sgd')
    return classes[settings.optimizer](model.parameters(), fused=True, **optimizer_arguments(settings))
