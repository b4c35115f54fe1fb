"""What JAX saves between the forward and the backward pass of a function, counted."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def residuals(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return the shape and dtype of each value that is saved for the backward pass and is no argument."""

    def backward(*args: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(function, *args)[1])

    program = jax.make_jaxpr(backward)(*args).jaxpr
    arguments = {*program.invars, *program.constvars}
    saved = dict.fromkeys(v for v in program.outvars if not isinstance(v, core.Literal) and v not in arguments)
    return [v.aval for v in saved]


def residual_bytes(function: Callable[..., Any], *args: Any) -> int:
    return sum(aval.size * aval.dtype.itemsize for aval in residuals(function, *args))


def residual_dtypes(function: Callable[..., Any], *args: Any) -> set[str]:
    return {str(aval.dtype) for aval in residuals(function, *args)}
