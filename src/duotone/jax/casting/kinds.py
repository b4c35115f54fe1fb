"""The kinds of operations carried out: what the operands of a primitive are cast to, and what its results are."""

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from jax import lax

from duotone.jax import primitives
from duotone.jax.casting import numbers, sums
from duotone.jax.casting.site import Handler, Site
from duotone.jax.casting.steps import Step
from duotone.jax.casting.values import BIT, FLOAT32, HALF, HELD, OPEN, Kind, Value, dtype_of, is_float

_PRODUCTS = frozenset((*primitives.FAMILIES["product"].split(), *primitives.FAMILIES["convolution"].split()))


def product(site: Site) -> Step:
    """Cast operands to 16 bits, and so is the result, unless the call asks for more.

    `precision` other than the default asks for FP32 operands; `preferred_element_type=float32` of 16-bit operands asks
    for FP32 results. A product that sums nothing stays FP32 if it is given FP32.
    """
    if asks_for_float32(site.equation.params):
        return site.in_float32(form="")
    if site.has(Kind.HELD) and _sums_nothing(site):
        return site.in_float32(wants=False, form="")
    (traced,) = site.types_out
    is_asked_for = traced.dtype == FLOAT32 and all(site.types[place].dtype == site.compute for place in site.floats)
    if is_asked_for:
        return site.step(site.compute, HELD)
    return site.in_compute(params={"preferred_element_type": site.compute})


def product_as_given(site: Site) -> Step:
    """Take operands as they come."""
    if site.has(Kind.HALF) and not site.has(Kind.HELD):
        return site.in_compute(params={"preferred_element_type": site.compute})
    return site.step(FLOAT32, HELD if site.has(Kind.HELD) else OPEN)


def asks_for_float32(params: Mapping[str, Any]) -> bool:
    """Return whether a product names a precision beyond the default."""
    precision = params.get("precision")
    each = precision if isinstance(precision, tuple) else (precision,)
    return any(one not in (None, lax.Precision.DEFAULT) for one in each)


def _sums_nothing(site: Site) -> bool:
    if site.equation.name != "dot_general":
        return False
    (contracted, _), _ = site.equation.params["dimension_numbers"]
    return math.prod(site.types[0].shape[axis] for axis in contracted) == 1


def float32(site: Site) -> Step:
    """Cast operands to FP32; the result stays FP32."""
    return site.in_float32()


def float32_inside(site: Site) -> Step:
    """Compute in FP32, and round the result if 16 bits came and nothing that is held."""
    if site.has(Kind.HELD):
        return site.in_float32(wants=False, form="")
    return site.rounded() if site.has(Kind.HALF) else site.step(None, OPEN)


def repeat(site: Site) -> Step:
    """Copy; where elements are repeated, their gradient is a sum, which is FP32."""
    value = site.given[0]
    if value.number == 0 and value.kind is Kind.OPEN and site.equation.name == "broadcast_in_dim":
        # zeros that the program makes
        return site.step(None, replace(value, is_start=True), form="move")
    return site.rounded("move") if value.kind is Kind.HALF and _is_repeated(site) else move(site)


def _is_repeated(site: Site) -> bool:
    if site.equation.name != "broadcast_in_dim":
        return True
    # without products of sizes, which may be symbols in what is exported
    shape, dimensions = site.types_out[0].shape, site.equation.params["broadcast_dimensions"]
    kept = dict(zip(dimensions, site.types[0].shape, strict=True))
    return any(size != kept.get(axis, 1) for axis, size in enumerate(shape))


def lookup(site: Site) -> Step:
    """Copy by index; the gradient of what was read often is a sum, which is FP32.

    Rows of a table that is a weight start a residual stream, which is in what the policy's `residual` says.
    """
    value = site.given[0]
    if value.kind is Kind.OPEN and len(site.types[0].shape) == 2 and _reads_rows(site):
        return site.rounded() if site.planner.residual == "compute" else site.step(None, HELD)
    # what is out of bounds is NaN or 0, so it is no longer known to be one number
    return site.rounded() if value.kind is Kind.HALF else site.step(None, value.without_number)


def _reads_rows(site: Site) -> bool:
    return tuple(site.equation.params["slice_sizes"]) == (1, site.types[0].shape[1])


def widest(site: Site) -> Step:
    """Cast operands to the widest among them; a number that 16 bits lack is the nearest that they have."""
    if site.has(Kind.HELD):
        return site.in_float32(wants=False, form="pointwise" if site.equation.name == "select_n" else "")
    if site.is_raised:
        return site.step(FLOAT32, HELD if _has_lost(site) else OPEN, form="pointwise")
    if site.has(Kind.HALF):
        return site.in_compute("pointwise" if site.equation.name == "select_n" else "")
    if _has_lost(site):
        # a mask that is made before it meets 16 bits
        return site.step(None, HELD)
    values = site.float_values
    narrow = bool(values) and all(
        value.narrow or (value.number is not None and numbers.is_exact(value.number, site.compute)) for value in values
    )
    return site.step(None, Value(Kind.OPEN, narrow=narrow))


def scatter(site: Site) -> Step:
    """Write by index: as `widest`, but a function that combines elements runs on what it was traced for."""
    if site.equation.params.get("update_jaxpr") is None:
        return widest(site)
    return float32_inside(site)


def pointwise(site: Site) -> Step:
    """Take operands as they come: 16 bits beside a weight or a number give 16 bits, beside held FP32 they give FP32."""
    if site.has(Kind.HELD):
        return site.in_float32(wants=False)
    if site.is_raised:
        return site.step(FLOAT32, OPEN, form="pointwise")
    if not site.has(Kind.HALF):
        return site.step(None, OPEN, form="pointwise")
    if site.has_inexact():
        return site.rounded("pointwise")
    return site.in_compute("pointwise")


def curved(site: Site) -> Step:
    """Do the same, computed in FP32, and so is the derivative: it has squares, which overflow in FP16."""
    is_half = site.has(Kind.HALF) and not site.has(Kind.HELD) and not site.is_raised
    step = site.rounded("pointwise") if is_half else pointwise(site)
    return replace(step, wants_float32=step.wants_float32 or site.equation.name in primitives.STEEP)


def number(site: Site) -> Step:
    """Do the same; beside a number that would become 0 or Inf in 16 bits the result is FP32, and so is 1 / x."""
    if site.equation.params.get("out_dtype") is not None:
        return site.as_traced()
    is_reciprocal = site.equation.name == "div" and site.given[0].number is not None
    if _has_lost(site) or (is_reciprocal and site.has(Kind.HALF)):
        return site.in_float32(wants=site.has(Kind.HALF))
    is_quotient = site.equation.name == "div" and site.given[1].number is None
    return curved(site) if is_quotient else pointwise(site)


def _has_lost(site: Site) -> bool:
    return any(numbers.is_lost(each, site.compute) for each in site.numbers())


def bound(site: Site) -> Step:
    """Do the same; with a bound that 16 bits move to 0 or 1 the result is FP32, beyond their range it is their end."""
    if site.has(Kind.HELD) or not site.has(Kind.HALF):
        return pointwise(site)
    if any(numbers.is_moved(each, site.compute) for each in site.numbers()):
        return site.in_float32()
    if site.is_raised or any(value.kind is Kind.OPEN and value.number is None for value in site.float_values):
        return pointwise(site)
    return site.in_compute("pointwise")


def comparison(site: Site) -> Step:
    """Compare in FP32 what is not all in 16 bits, which is exact."""
    kinds = {value.kind for value in site.float_values}
    return site.step(FLOAT32 if len(kinds) > 1 else None, HELD, form="comparison")


def move(site: Site) -> Step:
    """Give what is given; of several operands, each for itself."""
    values = list(site.given)
    if len(values) != len(site.types_out):
        own = site.float_values
        values = [own[0] if own else HELD] * len(site.types_out)
    # the real part of a complex number is FP32
    values = [HELD if value.kind is Kind.OTHER else value for value in values]
    return site.step(None, values, form="move")


def convert(site: Site) -> Step:
    """Cast as the program says: what it widens stays FP32, what it rounds is rounded."""
    (value,), (traced,), (traced_out,) = site.given, site.types, site.types_out
    if not is_float(traced_out, site.compute):
        return site.step(None, HELD)
    if traced_out.dtype == site.compute:
        # cast by a rule's cast, which a number that 16 bits lack survives
        return site.step(site.compute, HALF)
    if value.kind is Kind.OTHER:
        if value.number is not None:
            return site.step(None, Value(Kind.OPEN, value.number))
        return site.step(None, BIT if traced.dtype == bool else HELD)
    if traced.dtype == FLOAT32:
        # nothing to do, but for a sharding that the cast may carry
        own = dtype_of(value, traced, site.compute)
        return site.step(None, value, params={"new_dtype": own}, form="move")
    return site.step(None, HELD)


def as_traced(site: Site) -> Step:
    """Run on the dtypes that the equation was traced in."""
    return site.as_traced()


_BY_NAME: Mapping[str, Handler] = MappingProxyType(
    {
        "convert_element_type": convert,
        "gather": lookup,
        "scatter": scatter,
        **dict.fromkeys(primitives.FAMILIES["overlap"].split(), repeat),
        **dict.fromkeys(primitives.FAMILIES["number"].split(), sums.summing(number)),
        **dict.fromkeys(primitives.FAMILIES["bound"].split(), bound),
        **dict.fromkeys(primitives.FAMILIES["scaled_product"].split(), as_traced),
        **dict.fromkeys(primitives.POINTWISE, pointwise),
        **dict.fromkeys(primitives.CURVED, curved),
        "neg": sums.summing(pointwise),
        "select_n": sums.summing(widest),
        **dict.fromkeys(("scatter-add", "scatter-sub"), sums.summing(float32_inside)),
        **dict.fromkeys(primitives.COMPARISONS, comparison),
        **dict.fromkeys(primitives.MOVES, move),
    }
)
_BY_KIND: Mapping[str, Handler] = MappingProxyType(
    {
        "compute": product,
        "float32": float32,
        "float32_inside": float32_inside,
        "widest": widest,
        "as_given": pointwise,
    }
)


def handler_for(kind: str, name: str) -> Handler:
    """Return what decides for a primitive that was given a kind."""
    if kind != "as_given":
        return _BY_KIND[kind]
    return product_as_given if name in _PRODUCTS else pointwise


def handler_of(name: str) -> Handler:
    """Return what decides for a primitive; one that is not known runs as it was traced."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    kind = primitives.kinds().get(name)
    return as_traced if kind is None else _BY_KIND[kind]
