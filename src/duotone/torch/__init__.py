"""Duotone for PyTorch: casting, loss scaling and master weights.

import duotone.torch as dt

model = dt.cast(model, "fp16")
optimizer = dt.AdamW(model.parameters(), lr=3e-4)
scaler = dt.LossScaler("fp16")
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from duotone.loss_scale import LossScale
from duotone.policy import Policy, Rule
from duotone.torch import checkpoints
from duotone.torch.averaging.average import Average
from duotone.torch.casting.activation_checkpointing import checkpoint_activations
from duotone.torch.casting.autocast import autocast
from duotone.torch.casting.cast import cast, policy_of, uncast
from duotone.torch.casting.keep_float32 import keep_float32
from duotone.torch.casting.linear_cross_entropy import linear_cross_entropy
from duotone.torch.casting.own_kinds import op_rule
from duotone.torch.checkpoints.contents import load_checkpoint, save_checkpoint
from duotone.torch.conversion import convert_optimizer, prepare
from duotone.torch.distributed.data_parallel import data_parallel
from duotone.torch.distributed.fully_shard import fully_shard
from duotone.torch.explanation import explain
from duotone.torch.exporting import export
from duotone.torch.full_precision import full_precision
from duotone.torch.memory_use import memory
from duotone.torch.near_misses import OF_MODULE as _OF_MODULE
from duotone.torch.near_misses import missing as _missing
from duotone.torch.optim import SGD, AdamW, Lion, MasterWeights
from duotone.torch.parameters.masters import load_master_weights, master_weights
from duotone.torch.scaling.grad_scaler import GradScaler
from duotone.torch.scaling.loss_scaler import LossScaler

__all__ = [
    "SGD",
    "AdamW",
    "Average",
    "GradScaler",
    "Lion",
    "LossScale",
    "LossScaler",
    "MasterWeights",
    "Policy",
    "Rule",
    "autocast",
    "cast",
    "checkpoint_activations",
    "checkpoints",
    "convert_optimizer",
    "data_parallel",
    "explain",
    "export",
    "full_precision",
    "fully_shard",
    "keep_float32",
    "linear_cross_entropy",
    "load_checkpoint",
    "load_master_weights",
    "master_weights",
    "memory",
    "op_rule",
    "policy_of",
    "prepare",
    "save_checkpoint",
    "uncast",
]


if not _TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        raise AttributeError(_missing("duotone.torch", name, _OF_MODULE, __all__))
