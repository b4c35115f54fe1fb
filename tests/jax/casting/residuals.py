"""What JAX saves between the forward and the backward pass of a function, counted."""

from collections import Counter
from collections.abc import Callable, Iterator
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


def equations(function: Callable[..., Any], *args: Any) -> Iterator[core.JaxprEqn]:
    """Yield every equation of a function, those inside of others too."""
    yield from _inside(jax.make_jaxpr(function)(*args).jaxpr)


def counts(function: Callable[..., Any], *args: Any) -> Counter[str]:
    """Return how often each primitive stands in a function."""
    return Counter(eqn.primitive.name for eqn in equations(function, *args))


def _inside(program: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in program.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _inside(inner)


def operand_dtypes(function: Callable[..., Any], *args: Any, of: str = "dot_general") -> list[str]:
    """Return the dtype of the first operand of each equation of a primitive."""
    return [str(eqn.invars[0].aval.dtype) for eqn in equations(function, *args) if eqn.primitive.name == of]
