"""Duotone for JAX: casting by a transform of programs, FP32 masters for any Optax optimizer, loss scaling.

import duotone.jax as dj
"""

from duotone.jax.scaling.value_and_grad import value_and_grad
from duotone.loss_scale import LossScale
from duotone.policy import Policy, Rule

__all__ = ["LossScale", "Policy", "Rule", "value_and_grad"]
