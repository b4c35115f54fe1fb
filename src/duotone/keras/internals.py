"""Every name of Keras that is not public, and every difference of its versions, each with its reason.

No other module of `duotone.keras` imports `keras.src` or asks for a version.
"""

from typing import Any

import keras
from keras.src.backend.common.stateless_scope import in_stateless_scope

__all__ = ["in_stateless_scope", "index_of", "is_released", "ops", "trained_variables"]

# Keras declares no types, and those that pyright infers from the body of an operation are wrong
ops: Any = keras.ops


def trained_variables(optimizer: Any) -> list[Any]:
    """Return the variables that an optimizer was built on; it keeps them under a private name alone."""
    return optimizer._trainable_variables


def index_of(optimizer: Any, variable: Any) -> int:
    """Return a variable's place among those that an optimizer was built on; on TensorFlow replicas have copies of it.

    Raises:
        ValueError: the optimizer was not built on it.
    """
    optimizer._check_variables_are_known([variable])
    return optimizer._get_variable_index(variable)


def is_released(variable: Any) -> bool:
    """Return whether `fit` on JAX has taken a variable's value away while it trains, and `value` would be the first.

    `Model.jax_state_sync` gives the values back.
    """
    return variable._value is None
