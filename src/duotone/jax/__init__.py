"""Duotone for JAX: casting by a transform of programs, FP32 masters for any Optax optimizer, loss scaling.

import duotone.jax as dj
"""

from duotone.jax.casting.keep_float32 import keep_float32
from duotone.jax.casting.op_rule import op_rule
from duotone.jax.casting.transform import autocast
from duotone.jax.explanation import explain
from duotone.jax.memory_use import memory
from duotone.jax.optim.master_weights import master_weights
from duotone.jax.optim.masters import masters
from duotone.jax.scaling.collapse import raise_if_collapsed
from duotone.jax.scaling.report import report
from duotone.jax.scaling.value_and_grad import value_and_grad
from duotone.jax.weights.cast import cast
from duotone.loss_scale import LossScale
from duotone.policy import Policy, Rule

__all__ = [
    "LossScale",
    "Policy",
    "Rule",
    "autocast",
    "cast",
    "explain",
    "keep_float32",
    "master_weights",
    "masters",
    "memory",
    "op_rule",
    "raise_if_collapsed",
    "report",
    "value_and_grad",
]
