"""Numbers of a program that 16 bits do not have: -1e9 in a mask, 1e-8 under a root, 0.999 in an average.

FP16 ends at 65504 and begins at 2^-24, BF16 ends a little below FP32. As in torch:

    stored in 16 bits    the nearest number that is neither Inf nor 0 (`held`)
    beside 16 bits       the result is FP32 if the number would become Inf or 0 (`is_lost`), or as a bound move to 0 or
                         1 (`is_moved`); else the number is exact while the operation runs, and the result is rounded

Inf, NaN and 0 stay what they are. Left out: numbers that are computed, such as the root of a traced number.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from duotone.jax import internals

# by format: the largest, the smallest above 0, and the largest below 1
_LIMITS = {
    "float16": (65504.0, 2.0**-24, 1 - 2.0**-11),
    "bfloat16": (float(jnp.finfo("bfloat16").max), 2.0**-133, 1 - 2.0**-8),
}


def held(number: float, compute: Any) -> float:
    """Return the nearest number that a 16-bit format has, neither Inf nor 0 unless it is so.

    >>> held(-1e9, jnp.dtype("float16")), held(1e-8, jnp.dtype("float16")) == 2**-24
    (-65504.0, True)
    """
    largest, smallest, _ = _LIMITS[compute.name]
    if not math.isfinite(number) or number == 0:
        return number
    return math.copysign(min(max(abs(number), smallest), largest), number)


def is_lost(number: float, compute: Any) -> bool:
    """Return whether a number would become Inf or 0.

    >>> is_lost(1e-12, jnp.dtype("float16")), is_lost(1e-12, jnp.dtype("bfloat16"))
    (True, False)
    """
    return held(number, compute) != number and not math.isnan(number)


def is_moved(number: float, compute: Any) -> bool:
    """Return whether a number in the range is moved to 0, or to 1 or -1 from below.

    >>> is_moved(1 - 1e-6, jnp.dtype("bfloat16")), is_moved(-1e9, jnp.dtype("float16"))
    (True, False)
    """
    largest, smallest, below_one = _LIMITS[compute.name]
    size = abs(number)
    return 0 < size < smallest or (below_one < size < 1 and size <= largest)


def is_exact(number: float, compute: Any) -> bool:
    """Return whether a format has a number exactly; NaN is in all.

    >>> is_exact(0.5, jnp.dtype("bfloat16")), is_exact(0.1, jnp.dtype("bfloat16"))
    (True, False)
    """
    # what is too large becomes Inf, which is another number: nothing to warn of
    with np.errstate(over="ignore"):
        return math.isnan(number) or float(np.asarray(number).astype(compute)) == number


def cast(array: Any, dtype: Any, number: float | None = None) -> Any:
    """Return an array in another dtype; if all its elements are `number`, one that the dtype has.

    >>> float(cast(jnp.float32(-1e9), jnp.dtype("float16"), -1e9))
    -65504.0
    """
    if array.dtype == dtype:
        return array
    if number is not None and dtype.name in _LIMITS and is_lost(number, dtype):
        nearest = held(number, dtype)
        # arithmetic, not a new array, so that its sharding stays
        factor = np.float32(nearest / number)
        array = lax.clamp(np.float32(-abs(nearest)), array, np.float32(abs(nearest))) if factor < 1 else array * factor
    return lax.convert_element_type(array, dtype)


def integer_of(value: Any) -> float | None:
    """Return the number that a known integer without dimensions is; None for others.

    >>> integer_of(np.int32(3)), integer_of(np.float32(3))
    (3.0, None)
    """
    if not internals.is_array_type(internals.type_of(value)) or not internals.is_concrete(value):
        return None
    return float(value) if not value.ndim and jnp.issubdtype(value.dtype, jnp.integer) else None


def number_of(value: Any) -> float | None:
    """Return the number that a known float is, or that all elements of a small array are; None for others.

    >>> number_of(np.float32(0.5)), number_of(np.zeros(3, int))
    (0.5, None)
    """
    if not jnp.issubdtype(value.dtype, jnp.floating) or value.ndim:
        return None
    return float(value)
