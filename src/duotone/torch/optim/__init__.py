"""Optimizers on FP32 masters: one file each on one base."""

from duotone.torch.optim.adamw import AdamW
from duotone.torch.optim.base import MasterOptimizer, check_parameters
from duotone.torch.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "MasterOptimizer", "check_parameters"]
