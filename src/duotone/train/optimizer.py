"""The optimizer that a run's settings ask for: Duotone's, and what any other library's is built with."""

from typing import Any

import torch
from torch import nn

import duotone.torch as dt
from duotone.run_settings import RunSettings


def optimizer_of(model: nn.Module, settings: RunSettings) -> torch.optim.Optimizer:
    """Return the optimizer of a cast model's parameters; where parameters are to be sharded, build it after that.

    >>> type(optimizer_of(nn.Linear(2, 2), RunSettings(optimizer="lion"))).__name__
    'Lion'
    """
    optimizer: Any = {"adamw": dt.AdamW, "lion": dt.Lion, "sgd": dt.SGD}[settings.optimizer]
    own = {"seed": settings.seed, "backend": settings.backend}
    return optimizer(model.parameters(), **optimizer_arguments(settings), **own)


def optimizer_arguments(settings: RunSettings) -> dict[str, Any]:
    """Return the arguments of the settings' optimizer that have the same names in every library.

    >>> optimizer_arguments(RunSettings(optimizer="sgd", learning_rate=0.1, weight_decay=0.0))
    {'lr': 0.1, 'weight_decay': 0.0, 'momentum': 0.9}
    """
    own = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {"betas": settings.betas}
    return {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, **own}
