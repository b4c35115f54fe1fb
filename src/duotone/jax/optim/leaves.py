"""The leaves of parameters as an optimizer sees them: split into weight and tail, their own master, or not trained."""

from typing import Any

import jax
import jax.numpy as jnp

from duotone.errors import OptimizerError
from duotone.jax.weights.codec import TAIL_DTYPE, decode
from duotone.jax.weights.plan import SPLIT_DTYPES
from duotone.policy import Policy


def is_split(leaf: Any) -> bool:
    """Return whether a leaf is a 16-bit weight."""
    return getattr(leaf, "dtype", None) in SPLIT_DTYPES


def is_trained(leaf: Any) -> bool:
    """Return whether an optimizer updates a leaf: a real or complex floating-point array, or a Python float.

    >>> is_trained(jnp.ones(2)), is_trained(1.0), is_trained(jnp.arange(2)), is_trained(None)
    (True, True, False, False)
    """
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, float | complex) if dtype is None else jnp.issubdtype(dtype, jnp.inexact)


def widened(leaf: Any, tail: jax.Array | None) -> Any:
    """Return a leaf as the inner optimizer sees it: its FP32 master, itself if it is one, None if it is not trained."""
    if is_split(leaf):
        # an integer decode also where the tail is zero: XLA may take a cast to 16 bits and back for nothing
        leaf = jnp.asarray(leaf)
        return decode(leaf, jnp.zeros_like(leaf, TAIL_DTYPE) if tail is None else tail)
    return leaf if is_trained(leaf) else None


def check_dtype(path: str, leaf: Any, policy: Policy) -> None:
    """Raise if a parameter has a dtype that the policy's masters cannot have.

    Raises:
        OptimizerError: it is 16-bit, but not the policy's weights; or it is 8-bit or narrower.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return
    if is_split(leaf) and dtype != policy.param:
        raise OptimizerError(
            f'parameter "{path}" is {dtype}, but the weights of policy "{policy.name}" are {policy.param}; cast the '
            "parameters with duotone.jax.cast and the same policy"
        )
    if jnp.dtype(dtype).itemsize < 2:
        raise OptimizerError(
            f'parameter "{path}" is {dtype}, which has no masters; keep weights in float32, bfloat16 or float16'
        )
