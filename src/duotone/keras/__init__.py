"""Duotone for Keras 3 on TensorFlow, JAX and torch: dtype policies, FP32 masters, a loss scale that cannot reach 0.

import duotone.keras as dk

The backend is Keras' own: nothing here imports TensorFlow, JAX or torch that Keras has not.
"""

from duotone.keras.checking import check
from duotone.keras.optim.loss_scale_optimizer import LossScaleOptimizer
from duotone.keras.optim.masters import Masters
from duotone.keras.policies.policy import policy
from duotone.keras.report.scale_report import ScaleReport
from duotone.keras.weights.load_master_weights import load_master_weights
from duotone.keras.weights.master_weights import master_weights
from duotone.loss_scale import LossScale
from duotone.policy import Policy, Rule

__all__ = [
    "LossScale",
    "LossScaleOptimizer",
    "Masters",
    "Policy",
    "Rule",
    "ScaleReport",
    "check",
    "load_master_weights",
    "master_weights",
    "policy",
]
