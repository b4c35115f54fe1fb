"""Optimizers on FP32 masters: one file each on one base, and `MasterWeights` around any other."""

from duotone.torch.optim.adamw import AdamW
from duotone.torch.optim.base import MasterOptimizer, check_parameters
from duotone.torch.optim.fused import FusedOptimizer
from duotone.torch.optim.lion import Lion
from duotone.torch.optim.master_weights import MasterWeights
from duotone.torch.optim.sgd import SGD
from duotone.torch.optim.wrappable import check_wrappable

# those with kernels of their own, which `prepare` puts in place of torch's
OWN: tuple[type[FusedOptimizer], ...] = (AdamW, SGD, Lion)

__all__ = [
    "OWN",
    "SGD",
    "AdamW",
    "FusedOptimizer",
    "Lion",
    "MasterOptimizer",
    "MasterWeights",
    "check_parameters",
    "check_wrappable",
]
