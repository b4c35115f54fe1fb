"""Why a product computes in FP32 although its policy computes in 16 bits."""

from typing import Any

import jax
from jax import lax

from duotone.jax import policies
from duotone.jax.casting import marks
from duotone.jax.explanation.equations import Equation
from duotone.jax.primitives import kinds
from duotone.policy import Policy

KEPT, OP_RULE, RULE, DEFAULT_PRECISION = "keep_float32", "op_rule", "rule", "jax_default_matmul_precision"


def reason_of(equation: Equation, policy: Policy | None) -> str | None:
    """Return what asked for a product in FP32 or for an FP32 result, None if nothing did or it is no product."""
    if policy is None or kinds().get(equation.name) != "compute" or not _is_wide(equation):
        return None
    marked = marks.kind_in(equation.scopes, equation.name)
    if marked is not None:
        return KEPT if marked == "float32" else OP_RULE
    if policies.computes_float32(policy, marks.without_marks(equation.scopes)):
        return RULE
    return _asked_by_call(equation)


def _is_wide(equation: Equation) -> bool:
    return any(
        str(getattr(atom.aval, "dtype", "")) == "float32"
        for atom in (*equation.source.invars, *equation.source.outvars)
    )


def _asked_by_call(equation: Equation) -> str | None:
    params = equation.source.params
    precision = params.get("precision")
    named = {name for each in (precision if isinstance(precision, tuple) else (precision,)) if (name := _name(each))}
    if named:
        name = named.pop()
        return DEFAULT_PRECISION if _name(_default()) == name else f'precision="{name}"'
    inputs = {str(getattr(atom.aval, "dtype", "")) for atom in equation.source.invars}
    preferred = str(params.get("preferred_element_type"))
    return "preferred_element_type=float32" if preferred == "float32" and "float32" not in inputs else None


def _default() -> Any:
    # an attribute that is made when JAX is imported
    config: Any = jax.config
    return config.jax_default_matmul_precision


def _name(precision: Any) -> str | None:
    """Return the name of a precision beyond the default, as users write it."""
    if precision is None or precision in ("default", lax.Precision.DEFAULT):
        return None
    try:
        return lax.Precision(precision).name.lower()
    except ValueError:
        return getattr(precision, "name", str(precision)).lower()
