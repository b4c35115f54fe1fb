"""A value through which no derivative goes: an error where there would be a 0."""

from typing import Any

import jax

from duotone.errors import OptimizerError


@jax.custom_jvp
def undifferentiated(array: Any) -> Any:
    """Return `array` as it is.

    Raises:
        OptimizerError: when differentiated with regard to something that `array` depends on.
    """
    return array


@undifferentiated.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise OptimizerError(
        "an update of 16-bit weights under jit is differentiated, but on a CPU it runs in pieces and in place, through "
        "which no derivative goes; differentiate it outside of jit, or with FP32 weights: masters(..., \"fp32\")"
    )
