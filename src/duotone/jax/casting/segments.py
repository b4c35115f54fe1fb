"""A program cut into segments: what is computed from saved values, and the products that it feeds.

A product (of matrices, a convolution, whatever is not cheap to compute twice) belongs to the first segment that has its
operands. What uses its result belongs to the next one. So a segment can be run again for the backward pass from what
crosses its border, which are results of products, without a product being computed twice. Three refinements move
equations such that less crosses:

    what adds to a product's result, rounds or reorders it stays with it (x + product is saved, not both),
    what depends on no product runs where it is first needed (a dropout's mask, the cast of a weight),
    what rounds a value to fewer bits stays with what made it.

Equations with effects, loops, branches and whatever has a rule of its own for the backward pass stand apart: between
the segments, never in one.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jax.extend import core

# reorder or repeat values; no arithmetic
_MOVES = """
    broadcast_in_dim concatenate copy copy_p expand_dims name optimization_barrier pad pvary reshape rev
    sharding_constraint slice split squeeze stop_gradient tile transpose
"""
_ARITHMETIC = """
    abs acos acosh add add_any and argmax argmin asin asinh atan atan2 atanh axis_index bitcast_convert_type cbrt ceil
    clamp clz complex conj convert_element_type cos cosh cumlogsumexp cummax cummin cumprod cumsum digamma div
    dynamic_slice eq eq_to erf erf_inv erfc exp exp2 expm1 floor gather ge gt imag integer_pow iota is_finite le le_to
    lgamma log log1p log2 logistic lt lt_to max min mul ne neg nextafter not one_minus_square or polynomial
    population_count pow random_bits random_clone random_fold_in random_seed random_split random_unwrap random_wrap
    real reciprocal reduce_and reduce_max reduce_min reduce_or reduce_precision reduce_prod reduce_sum reduce_xor
    reduce_window_max reduce_window_min reduce_window_sum rem rng_bit_generator round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh threefry2x32 xor
"""
SHAPE_CHANGES = frozenset(_MOVES.split())
# cheap beside a product, and the same when computed again; random bits are made from their key
RECOMPUTED = SHAPE_CHANGES | frozenset(_ARITHMETIC.split())
# need nothing saved for the backward pass, so they may stay with the product whose result they take (mul by a number)
_LINEAR = SHAPE_CHANGES | {"add", "add_any", "convert_element_type", "mul", "neg", "sub"}
# calls that are as cheap as what they call
CALLS = {"custom_jvp_call": "call_jaxpr", "jit": "jaxpr", "pjit": "jaxpr"}


@dataclass
class Segment:
    """Equations that may be run again together, and those that run after them, each apart."""

    together: list[core.JaxprEqn] = field(default_factory=list)
    apart: list[core.JaxprEqn] = field(default_factory=list)


def segments_of(jaxpr: core.Jaxpr) -> list[Segment]:
    """Return the equations of a program by segment, in an order in which they can run; effects keep theirs."""
    passing = _passing(jaxpr, *_as_early_as_possible(jaxpr))
    places = _as_late_as_needed(jaxpr, _as_early_as_possible(jaxpr, passing)[0])
    segments = [Segment() for _ in range(max(places, default=-1) + 1)]
    for eqn, place in zip(jaxpr.eqns, places, strict=True):
        segment = segments[place]
        (segment.apart if is_apart(eqn) else segment.together).append(eqn)
    return segments


def variables(atoms: Iterable[core.Var | core.Literal]) -> list[core.Var]:
    """Return which of an equation's operands are no numbers of the program."""
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def is_recomputed(eqn: core.JaxprEqn) -> bool:
    """Return whether an equation is so cheap that its result is computed again, not saved."""
    name = eqn.primitive.name
    if name in CALLS:
        return all(is_recomputed(inner) for inner in eqn.params[CALLS[name]].eqns)
    return name in RECOMPUTED


def is_apart(eqn: core.JaxprEqn) -> bool:
    """Return whether an equation stands between segments: effects happen once, loops are not run again."""
    if has_effects(eqn):
        return True
    if eqn.primitive.name == "custom_jvp_call" or is_recomputed(eqn):
        return False
    # what JAX lowers in two steps (since 0.11) it finds only where JAX itself has put it
    has_own_rule = eqn.primitive.name.startswith(("custom_vjp_call", "call_hi_primitive"))
    return has_own_rule or any(True for _ in core.jaxprs_in_params(eqn.params))


def has_effects(eqn: core.JaxprEqn) -> bool:
    """Return whether an equation does something besides its results; to use a mesh axis by name is none such."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def _as_early_as_possible(
    jaxpr: core.Jaxpr, passing: set[core.Var] | None = None
) -> tuple[list[int], dict[core.Var, int]]:
    """Return the first segment of each equation, and the first in which each value may be used.

    Args:
        jaxpr: a program.
        passing: values that may stay with a product in a wider format; None to let nothing stay with products.
    """
    # the segment that a value is made in, and the first where it may be used in what is not linear
    made = dict.fromkeys([*jaxpr.invars, *jaxpr.constvars], 0)
    ready = dict(made)
    places, last_effect = [], 0
    for eqn in jaxpr.eqns:
        operands = variables(eqn.invars)
        place = max((ready[v] for v in operands), default=0)
        beside = max((made[v] for v in operands), default=0)
        if has_effects(eqn):
            place = last_effect = max(place, last_effect)
        if is_apart(eqn):
            before, after = place + 1, place + 1
        elif not is_recomputed(eqn):
            before, after = place, place + 1
        elif (
            passing is not None
            and beside < place
            and _stays_with(eqn, [v for v in operands if ready[v] == place], passing)
        ):
            before, after, place = beside, place, beside
        else:
            before, after = place, place
        places.append(place)
        for v in eqn.outvars:
            made[v], ready[v] = before, after
    return places, ready


def _as_late_as_needed(jaxpr: core.Jaxpr, places: list[int]) -> list[int]:
    """Move what depends on no product to its first use, and what rounds beside its origin; return the segments."""
    places = list(places)
    independent = _independent(jaxpr)
    needed: dict[core.Var, int] = {}
    for number in reversed(range(len(places))):
        eqn = jaxpr.eqns[number]
        if eqn.outvars and independent.issuperset(eqn.outvars):
            places[number] = min((needed[v] for v in eqn.outvars if v in needed), default=places[number])
        for v in variables(eqn.invars):
            needed[v] = min(needed.get(v, places[number]), places[number])
    made = {}
    for number, eqn in enumerate(jaxpr.eqns):
        if _narrows(eqn) and independent.issuperset(eqn.outvars):
            places[number] = made.get(eqn.invars[0], places[number])
        made.update(dict.fromkeys(eqn.outvars, places[number]))
    return places


def _independent(jaxpr: core.Jaxpr) -> set[core.Var]:
    """Return the values that depend on no product, and on nothing that stands apart."""
    found = {*jaxpr.invars, *jaxpr.constvars}
    for eqn in jaxpr.eqns:
        if found.issuperset(variables(eqn.invars)) and is_recomputed(eqn) and not is_apart(eqn):
            found.update(eqn.outvars)
    return found


def _passing(jaxpr: core.Jaxpr, places: list[int], ready: dict[core.Var, int]) -> set[core.Var]:
    """Return the values that only pass by linear steps into a rounding, or into a sum with what was there before.

    Such a sum is a residual stream's. Its other operand is no input, which is saved in any case.
    """
    inputs = {*jaxpr.invars, *jaxpr.constvars}
    passing = dict.fromkeys(variables(jaxpr.outvars), False)
    for eqn, place in zip(reversed(jaxpr.eqns), reversed(places), strict=True):
        ends = _narrows(eqn) or all(passing.get(v, False) for v in eqn.outvars)
        stream = [v for v in variables(eqn.invars) if v not in inputs and ready[v] < place]
        joins = any(_is_at_most(_bytes(eqn.outvars), _bytes([v])) for v in stream)
        for v in variables(eqn.invars):
            passing[v] = passing.get(v, True) and _is_linear(eqn) and (ends or (joins and v not in stream))
    return {v for v, passes in passing.items() if passes}


def _stays_with(eqn: core.JaxprEqn, products: list[core.Var], passing: set[core.Var]) -> bool:
    """Return whether to save an equation's result takes no more bytes than to save its operands, and nothing else."""
    if not _is_linear(eqn) or not _is_at_most(_elements(eqn.outvars), _elements(products)):
        return False
    return passing.issuperset(eqn.outvars) or _is_at_most(_bytes(eqn.outvars), _bytes(products))


def _is_linear(eqn: core.JaxprEqn) -> bool:
    name = eqn.primitive.name
    return name in _LINEAR and (name != "mul" or len(variables(eqn.invars)) == 1)


def _narrows(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name != "convert_element_type":
        return False
    avals: list[Any] = [eqn.outvars[0].aval, eqn.invars[0].aval]
    return avals[0].dtype.itemsize < avals[1].dtype.itemsize


def _is_at_most(first: Any, second: Any) -> bool:
    """Return whether a size is at most another; of symbolic sizes that nobody knows, no."""
    try:
        return bool(first <= second)
    except core.InconclusiveDimensionOperation:
        return False


def _elements(atoms: Iterable[core.Var | core.Literal]) -> int:
    arrays: list[Any] = [atom.aval for atom in atoms]
    return sum(array.size for array in arrays if hasattr(array, "size"))


def _bytes(atoms: Iterable[core.Var | core.Literal]) -> int:
    # tokens and the like have no size
    arrays: list[Any] = [atom.aval for atom in atoms if hasattr(atom.aval, "dtype")]
    return sum(_size(array.shape) * array.dtype.itemsize for array in arrays)


def _size(shape: Iterable[Any]) -> int:
    # sizes of what is exported may be symbols, which cannot be compared: large, and all the same
    return math.prod(each if isinstance(each, int) else 1024 for each in shape)
