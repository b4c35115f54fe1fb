"""Loops and branches: each value that goes round has one dtype, so kinds are joined until a body keeps them.

Constants of a scan that are 16-bit go in as FP32 and are rounded in the body, for their gradient is a sum over all
turns: in BF16, 1,000 ones add up to 256. Weights that are scanned (a stack of layers) go in as they are kept, for each
is used in one turn alone.

A sum over all turns is FP32 for the same reason: a carry that starts as a number, such as zeros, and that a turn adds
to, as it was or times a number. A residual stream, which starts with an array, and the state of a recurrent layer,
which goes through a product, are as kinds say.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jax import lax

from duotone.jax import internals
from duotone.jax.casting import numbers
from duotone.jax.casting.interpreter import run
from duotone.jax.casting.program import Equation, Program, flatten
from duotone.jax.casting.site import Handler, Site
from duotone.jax.casting.steps import Plan, Step
from duotone.jax.casting.values import FLOAT32, HELD, OPEN, Kind, Value, dtype_of, joined

# what adds to one of its operands, and what gives it as it is
_SUMS = frozenset({"add", "add_any", "sub", "scatter-add", "scatter-sub"})
_SAME = frozenset({"convert_element_type", "copy", "copy_p", "reshape", "squeeze", "expand_dims", "neg"})


def scan(site: Site) -> Step:
    """Plan and run `lax.scan`, and what is made of it: `lax.map`, `fori_loop` with known bounds."""
    params = site.equation.params
    places = internals.scan_places(params)
    body, constants = internals.opened(params["jaxpr"])
    known = [site.planner.constant(each) for each in constants]
    # what a turn is given; numbers are not, for they are arrays there
    inside = [Value(value.kind, narrow=value.narrow) for value in site.given]

    def plan(carry: Sequence[Value]) -> tuple[Plan, list[Value]]:
        for place, value in zip(places.carry, carry, strict=True):
            inside[place] = value
        found = site.planner.plan(body, [*known, *inside], site.equation.scopes)
        return found, [found.outputs[place] for place in places.carry_out]

    first = [inside[place] for place in places.carry]
    numbers_first = [site.given[place].number is not None for place in places.carry]
    inner, carry = _settled(plan, _with_sums(plan, first, numbers_first, places.carry, places.carry_out))
    stacked = [Value(inner.outputs[place].kind) for place in places.stacked]
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
                [found[place] for place in places.stacked],
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
        for place, array in zip((*places.carry_out, *places.stacked), (*last, *ys), strict=True):
            results[place] = array
        return results

    found: list[Value] = [OPEN] * len(inner.outputs)
    for place, value in zip((*places.carry_out, *places.stacked), (*carry, *stacked), strict=True):
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
    given = [Value(value.kind, narrow=value.narrow) for value in site.given]
    of_test, of_body, first = given[:n_test], given[n_test : n_test + n_body], given[n_test + n_body :]
    scopes = site.equation.scopes

    def plan(carry: Sequence[Value]) -> tuple[Plan, list[Value]]:
        known = [site.planner.constant(each) for each in body_constants]
        found = site.planner.plan(body, [*known, *of_body, *carry], scopes)
        return found, list(found.outputs)

    numbers_first = [value.number is not None for value in site.given[n_test + n_body :]]
    carry_places, carry_out = range(n_body, n_body + len(first)), range(len(first))
    first = _with_sums(plan, first, numbers_first, carry_places, carry_out)
    inner, carry = _settled(plan, first)
    known = [site.planner.constant(each) for each in test_constants]
    tested = site.planner.plan(test, [*known, *of_test, *carry], scopes)
    values = [*of_test, *of_body, *carry]
    targets = [dtype_of(value, traced, site.compute) for value, traced in zip(values, site.types, strict=True)]
    dtypes = targets[n_test + n_body :]

    def runner(operands: list[Any]) -> list[Any]:
        fixed_test, fixed_body = operands[:n_test], operands[n_test : n_test + n_body]

        def turn(carried: Sequence[Any]) -> list[Any]:
            found = run(inner, body_constants, [*fixed_body, *carried])
            return [_cast(array, dtype) for array, dtype in zip(found, dtypes, strict=True)]

        def goes_on(carried: Sequence[Any]) -> Any:
            return run(tested, test_constants, [*fixed_test, *carried])[0]

        return list(lax.while_loop(goes_on, turn, operands[n_test + n_body :]))

    return site.step(targets, carry, runner=runner, inner=[tested, inner])


def branches(site: Site) -> Step:
    """Plan and run `lax.cond` and `lax.switch`: a result is what the branches' results are together."""
    programs = [internals.opened(each) for each in site.equation.params["branches"]]
    given = [Value(value.kind, narrow=value.narrow) for value in site.given[1:]]
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


def _settled(
    plan: Callable[[Sequence[Value]], tuple[Plan, list[Value]]], carry: list[Value]
) -> tuple[Plan, list[Value]]:
    """Return the plan of a body that keeps the kinds of its carry, and those."""
    while True:
        inner, after = plan(carry)
        together = [joined(before, each) for before, each in zip(carry, after, strict=True)]
        if together == carry:
            return inner, carry
        # kinds only rise, so this ends
        carry = together


def _with_sums(
    plan: Callable[[Sequence[Value]], tuple[Plan, list[Value]]],
    carry: list[Value],
    are_numbers: Sequence[bool],
    carry_in: Sequence[int],
    carry_out: Sequence[int],
) -> list[Value]:
    """Return the first carry with those held that start as a number and sum up what 16-bit turns give.

    Args:
        plan: of a body, given its carry.
        carry: what it is at first.
        are_numbers: whether each is one number at first.
        carry_in: the places of the carry among the body's inputs.
        carry_out: its places among the body's results.
    """
    program = plan(carry)[0].program
    return [
        HELD
        if is_number and value.kind is Kind.OPEN and _is_sum(program, program.inputs[own], program.outputs[own_out])
        else value
        for is_number, value, own, own_out in zip(are_numbers, carry, carry_in, carry_out, strict=True)
    ]


def _is_sum(program: Program, start: int, end: int) -> bool:
    """Return whether a result is a value that something was added to, as it was or times a scalar."""
    makers = {number: equation for equation in program.equations for number in equation.outputs}

    @functools.cache
    def leads(number: int, is_added: bool) -> bool:
        equation = makers.get(number)
        if equation is None:
            return number == start and is_added
        name, operands = equation.name, equation.inputs
        if name in _SUMS:
            # of a scatter, the array that is added to
            return any(leads(each, True) for each in (operands[:1] if name.startswith("scatter") else operands))
        if name == "select_n":
            return any(leads(each, is_added) for each in operands[1:])
        if name in ("mul", "div"):
            first, second = operands
            own = [first] if not program.types[second].shape else []
            own += [second] if name == "mul" and not program.types[first].shape else []
            return any(leads(each, is_added) for each in own)
        if name in _SAME:
            return leads(operands[0], is_added)
        return any(
            leads(operands[place + skipped], True)
            for body, skipped, places, end_inside in _bodies(equation, equation.outputs.index(number))
            for place in places
            if _is_sum(body, body.inputs[place], end_inside)
        )

    return leads(end, False)


def _bodies(equation: Equation, place: int) -> Iterator[tuple[Program, int, Sequence[int], int]]:
    """Yield the programs that make a result of an equation inside of a loop's body.

    Args:
        equation: of the body.
        place: of the result.

    Yields:
        The program; how many operands of the equation are none of its inputs; inputs that may be summed up; the result.
    """
    params = equation.params
    if equation.name == "scan":
        own = internals.scan_places(params)
        if place in own.carry_out:
            body = flatten(internals.opened(params["jaxpr"])[0])
            yield body, 0, (own.carry[own.carry_out.index(place)],), body.outputs[place]
    elif equation.name in ("remat2", "remat", "checkpoint"):
        body = flatten(internals.opened(params["jaxpr"])[0])
        yield body, 0, range(len(body.inputs)), body.outputs[place]
    elif equation.name == "cond":
        for each in params["branches"]:
            body = flatten(internals.opened(each)[0])
            yield body, 1, range(len(body.inputs)), body.outputs[place]


def _together(values: Sequence[Value]) -> Value:
    first, *rest = (Value(value.kind, narrow=value.narrow) for value in values)
    for each in rest:
        first = joined(first, each)
    return first


def _cast(array: Any, dtype: Any) -> Any:
    return array if array.dtype == dtype else numbers.cast(array, dtype)


LOOPS: Mapping[str, Handler] = MappingProxyType({"scan": scan, "while": while_loop, "cond": branches})
