"""Loops and branches: each value that goes round has one dtype, so kinds are joined until a body keeps them.

Constants of a scan that are 16-bit go in as FP32 and are rounded in the body, for their gradient is a sum over all
turns: in BF16, 1,000 ones add up to 256. Weights that are scanned (a stack of layers) go in as they are kept, for each
is used in one turn alone.

A sum over all turns is FP32 for the same reason, see `sums`. A residual stream that starts in 16 bits, and the state of
a recurrent layer that goes through a product, are as kinds say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from jax import lax

from duotone.jax import internals
from duotone.jax.casting import numbers, sums
from duotone.jax.casting.interpreter import run
from duotone.jax.casting.site import Handler, Site
from duotone.jax.casting.steps import Plan, Step
from duotone.jax.casting.values import FLOAT32, HALF, HELD, OPEN, START, Kind, Value, dtype_of, joined


def scan(site: Site) -> Step:
    """Plan and run `lax.scan`, and what is made of it: `lax.map`, `fori_loop` with known bounds."""
    params = site.equation.params
    places = internals.scan_places(params)
    body, constants = internals.opened(params["jaxpr"])
    known = [site.planner.constant(each) for each in constants]
    # what a turn is given; numbers are not, for they are arrays there
    inside = [value.without_number for value in site.given]

    def plan(carry: Sequence[Value]) -> tuple[Plan, list[Value]]:
        for place, value in zip(places.carry, carry, strict=True):
            inside[place] = value
        found = site.planner.plan(body, [*known, *inside], site.equation.scopes)
        return found, [found.outputs[place] for place in places.carry_out]

    carry = _settled(plan, [site.given[place] for place in places.carry], places.carry, places.carry_out)
    inner = carry.plan
    # a sum so far is rounded as the sum is
    stacked = [
        HALF if inner.program.outputs[place] in carry.sums else Value(inner.outputs[place].kind)
        for place in places.stacked
    ]
    entry = [dtype_of(value, traced, site.compute) for value, traced in zip(inside, site.types, strict=True)]
    targets: list[Any] = list(entry)
    for place in places.constants:
        # summed in FP32
        targets[place] = FLOAT32 if inside[place].kind is Kind.HALF else targets[place]
    for place in places.scanned:
        targets[place] = site.compute if site.given[place].narrow else targets[place]
    dtypes = [entry[place] for place in places.carry]

    def runner(operands: list[Any]) -> list[Any]:
        fixed = [operands[place] for place in places.constants]

        def turn(carried: Sequence[Any], scanned: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            given = _placed(places, fixed, carried, scanned)
            given = [_cast(array, dtype) for array, dtype in zip(given, entry, strict=True)]
            found = run(inner, constants, given)
            return (
                [_cast(found[place], dtype) for place, dtype in zip(places.carry_out, dtypes, strict=True)],
                [
                    _cast(found[place], site.compute) if value.kind is Kind.HALF else found[place]
                    for place, value in zip(places.stacked, stacked, strict=True)
                ],
            )

        last, ys = lax.scan(
            turn,
            [operands[place] for place in places.carry],
            [operands[place] for place in places.scanned],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        results: list[Any] = [None] * (len(last) + len(ys))
        for place, array in zip((*places.carry_out, *places.stacked), (*carry.ended(last), *ys), strict=True):
            results[place] = array
        return results

    found: list[Value] = [OPEN] * len(inner.outputs)
    for place, value in zip((*places.carry_out, *places.stacked), (*carry.after, *stacked), strict=True):
        found[place] = value
    # casts of weights that are scanned stand outside, where a cast back to what they came as costs nothing
    return site.step(targets, found, runner=runner, inner=[inner])


def _placed(places: internals.Scan, fixed: Sequence[Any], carried: Sequence[Any], scanned: Sequence[Any]) -> list[Any]:
    given: list[Any] = [None] * (len(fixed) + len(carried) + len(scanned))
    order = (*places.constants, *places.carry, *places.scanned)
    for place, array in zip(order, (*fixed, *carried, *scanned), strict=True):
        given[place] = array
    return given


def while_loop(site: Site) -> Step:
    """Plan and run `lax.while_loop`."""
    params = site.equation.params
    n_test, n_body = params["cond_nconsts"], params["body_nconsts"]
    test, test_constants = internals.opened(params["cond_jaxpr"])
    body, body_constants = internals.opened(params["body_jaxpr"])
    given = [value.without_number for value in site.given]
    of_test, of_body, first = given[:n_test], given[n_test : n_test + n_body], given[n_test + n_body :]
    scopes = site.equation.scopes

    def plan(carry: Sequence[Value]) -> tuple[Plan, list[Value]]:
        known = [site.planner.constant(each) for each in body_constants]
        found = site.planner.plan(body, [*known, *of_body, *carry], scopes)
        return found, list(found.outputs)

    carry = _settled(plan, site.given[n_test + n_body :], range(n_body, len(given) - n_test), range(len(first)))
    inner = carry.plan
    known = [site.planner.constant(each) for each in test_constants]
    tested = site.planner.plan(test, [*known, *of_test, *carry.inside], scopes)
    values = [*of_test, *of_body, *carry.inside]
    targets = [dtype_of(value, traced, site.compute) for value, traced in zip(values, site.types, strict=True)]
    dtypes = targets[n_test + n_body :]

    def runner(operands: list[Any]) -> list[Any]:
        fixed_test, fixed_body = operands[:n_test], operands[n_test : n_test + n_body]

        def turn(carried: Sequence[Any]) -> list[Any]:
            found = run(inner, body_constants, [*fixed_body, *carried])
            return [_cast(array, dtype) for array, dtype in zip(found, dtypes, strict=True)]

        def goes_on(carried: Sequence[Any]) -> Any:
            return run(tested, test_constants, [*fixed_test, *carried])[0]

        return carry.ended(lax.while_loop(goes_on, turn, operands[n_test + n_body :]))

    return site.step(targets, carry.after, runner=runner, inner=[tested, inner])


def branches(site: Site) -> Step:
    """Plan and run `lax.cond` and `lax.switch`: a result is what the branches' results are together."""
    programs = [internals.opened(each) for each in site.equation.params["branches"]]
    given = [value.without_number for value in site.given[1:]]
    plans = [
        site.planner.plan(body, [*(site.planner.constant(each) for each in constants), *given], site.equation.scopes)
        for body, constants in programs
    ]
    found = [_together(values) for values in zip(*(plan.outputs for plan in plans), strict=True)]
    types = site.types_out
    dtypes = [dtype_of(value, traced, site.compute) for value, traced in zip(found, types, strict=True)]

    platforms = site.equation.params.get("branches_platforms")

    def branch(plan: Plan, constants: list[Any]) -> Callable[..., list[Any]]:
        def inside(*args: Any) -> list[Any]:
            results = run(plan, constants, args)
            return [_cast(array, dtype) for array, dtype in zip(results, dtypes, strict=True)]

        return inside

    functions = [branch(plan, constants) for plan, (_, constants) in zip(plans, programs, strict=True)]

    def runner(operands: list[Any]) -> list[Any]:
        index, *args = operands
        if platforms is None:
            return list(lax.switch(index, functions, *args))
        # a branch is compiled for its own platforms alone, where its kernels are known
        of_platform = {name: each for names, each in zip(platforms, functions, strict=True) for name in names or ()}
        default = next((each for names, each in zip(platforms, functions, strict=True) if names is None), None)
        return list(lax.platform_dependent(*args, default=default, **of_platform))

    return site.step(None, found, runner=runner, inner=plans)


@dataclass(frozen=True, slots=True)
class _Carry:
    """What goes round in a loop, settled.

    Attributes:
        plan: of the body.
        inside: what each value is in the loop.
        after: what it is after the loop.
        sums: results of the body that are FP32 sums of 16-bit terms, to be rounded after the loop.
    """

    plan: Plan
    inside: list[Value]
    after: list[Value]
    sums: frozenset[int]

    def ended(self, arrays: Sequence[Any]) -> list[Any]:
        """Return the carry as it is after the loop."""
        compute = self.plan.compute
        return [
            _cast(array, compute) if value.kind is Kind.HALF else array
            for array, value in zip(arrays, self.after, strict=True)
        ]


def _settled(
    plan: Callable[[Sequence[Value]], tuple[Plan, list[Value]]],
    given: Sequence[Value],
    carry_in: Sequence[int],
    carry_out: Sequence[int],
) -> _Carry:
    """Return the plan of a body that keeps the kinds of its carry, and those.

    Args:
        plan: of a body, given its carry.
        given: what the loop is given as carry.
        carry_in: the places of the carry among the body's inputs.
        carry_out: its places among the body's results.
    """
    # a number is what a sum starts with, and an array in the loop
    inner, carry = _kept(plan, [START if _is_number(value) else value.without_number for value in given])
    program = inner.program
    of_each = [
        sums.sums_of(program, program.inputs[place]) if value.kind is Kind.HALF else frozenset()
        for place, value in zip(carry_in, carry, strict=True)
    ]
    are_sums = [program.outputs[place] in found for place, found in zip(carry_out, of_each, strict=True)]
    after = [
        # outside, what has become of a number is none to start with
        replace(value, is_start=value.is_start and each.is_start)
        for value, each in zip(carry, given, strict=True)
    ]
    if any(are_sums):
        inner, carry = _kept(plan, [HELD if is_sum else value for value, is_sum in zip(carry, are_sums, strict=True)])
        after = [value if is_sum else new for value, new, is_sum in zip(after, carry, are_sums, strict=True)]
    rounded = frozenset().union(*(found for found, is_sum in zip(of_each, are_sums, strict=True) if is_sum))
    return _Carry(inner, carry, after, rounded)


def _is_number(value: Value) -> bool:
    return value.kind is Kind.OPEN and value.number is not None


def _kept(plan: Callable[[Sequence[Value]], tuple[Plan, list[Value]]], carry: list[Value]) -> tuple[Plan, list[Value]]:
    while True:
        inner, after = plan(carry)
        together = [joined(before, each) for before, each in zip(carry, after, strict=True)]
        if together == carry:
            return inner, carry
        # kinds only rise, so this ends
        carry = together


def _together(values: Sequence[Value]) -> Value:
    first, *rest = (value.without_number for value in values)
    for each in rest:
        first = joined(first, each)
    return first


def _cast(array: Any, dtype: Any) -> Any:
    return array if array.dtype == dtype else numbers.cast(array, dtype)


LOOPS: Mapping[str, Handler] = MappingProxyType({"scan": scan, "while": while_loop, "cond": branches})
