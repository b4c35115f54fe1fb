"""Sums that a function writes out, a term at a time: in BF16 they would stop at 256, where 1 is half of the spacing.

    s = jnp.zeros(n); s = s + gate * x     FP32: zeros that a program makes are a start, and FP32 stays so, as in torch
    (x1 + x2) * gate + x3                  computed in FP32 and rounded once, at its end: its inner sums are parts
    a carry that a turn adds to, and       FP32 in the loop, rounded after it; a residual stream, which the turn reads
    that nothing else in it reads          otherwise too, is in the format of what it starts with

A part may be multiplied, chosen from and reshaped on its way into the next sum, but nothing else reads it.
"""

from collections.abc import Iterator, Sequence

from duotone.jax import internals
from duotone.jax.casting.program import Equation, Program, flatten
from duotone.jax.casting.site import Handler, Site
from duotone.jax.casting.steps import Step
from duotone.jax.casting.values import FLOAT32, HELD, OPEN, START, Kind

# what adds to one of its operands; of a scatter, to the first
_SUMS = frozenset({"add", "add_any", "sub", "scatter-add", "scatter-sub"})
_MOVES = frozenset({"convert_element_type", "copy", "copy_p", "expand_dims", "reshape", "squeeze", "transpose"})


def summing(handler: Handler) -> Handler:
    """Return what decides for a primitive that adds, or that may stand between two sums; `handler` for all else."""

    def decide(site: Site) -> Step:
        return (None if site.has(Kind.HELD) else _with_start(site) or _of_parts(site)) or handler(site)

    return decide


def _with_start(site: Site) -> Step | None:
    """Return the step of an equation that goes on with a start: 16 bits added to it give FP32, times 0 it is one."""
    starts = {place for place, value in enumerate(site.given) if value.is_start}
    if any(_adds(site.equation, place) for place in starts):
        return site.step(FLOAT32, HELD if site.has(Kind.HALF) else START, form="pointwise")
    if not any(_passes_on(site.equation, place) for place in starts):
        return None
    # of several values one is chosen: all are to be starts, or numbers
    others = [value for place, value in enumerate(site.given) if place not in starts and value.number is None]
    is_start = site.equation.name != "select_n" or all(value.kind is Kind.OTHER for value in others)
    return site.step(FLOAT32, START, form="pointwise") if is_start else None


def _of_parts(site: Site) -> Step | None:
    """Return the step of a sum that is a part of another one, or the end of one."""
    if site.ends_sum:
        return site.rounded("pointwise")
    is_part = site.is_raised and site.equation.name in _SUMS
    return site.step(FLOAT32, OPEN, form="pointwise") if is_part else None


def parts(program: Program, steps: Sequence[Step]) -> tuple[frozenset[int], frozenset[int]]:
    """Return the places of equations that compute parts of sums, and of those that sums end with.

    Args:
        program: the equations.
        steps: what was decided for them, none of it a part.
    """
    users = _users(program)
    into_sums: set[int] = set()
    for place in range(len(steps) - 1, -1, -1):
        outputs = program.equations[place].outputs
        feeds = [user for number in outputs for user in users.get(number, ())]
        is_read_by_sums = bool(feeds) and all(
            _adds(program.equations[user], operand)
            or (_passes_on(program.equations[user], operand) and (user in into_sums or _chooses(steps[user])))
            for user, operand in feeds
        )
        if is_read_by_sums and not set(outputs).intersection(program.outputs):
            into_sums.add(place)
    found, ends, inner = set(), set(), set()
    for place, step in enumerate(steps):
        name, goes_on = step.equation.name, bool(inner.intersection(step.equation.inputs))
        if not any(value.kind is Kind.HALF for value in step.found):
            continue
        if place in into_sums and (goes_on or name in _SUMS):
            inner.update(step.equation.outputs)
            if name not in _MOVES:
                found.add(place)
        elif goes_on:
            ends.add(place)
    return frozenset(found), frozenset(ends)


def sums_of(program: Program, start: int) -> frozenset[int]:
    """Return the results of a program that are sums of an input and more, if nothing else is done with the input.

    Args:
        program: a loop's body.
        start: the value of the input.
    """
    return _sums_of(program, start) or frozenset()


def _sums_of(program: Program, start: int) -> frozenset[int] | None:
    # what comes of the input, and whether something was added to it
    found = {start: False}
    for equation in program.equations:
        for operand, number in enumerate(equation.inputs):
            if number not in found:
                continue
            reached = _reached(equation, operand)
            if reached is None:
                return None
            for output, is_sum in reached:
                found[output] = found.get(output, False) or found[number] or is_sum
    return frozenset(number for number, is_sum in found.items() if is_sum and number in program.outputs)


def _reached(equation: Equation, operand: int) -> list[tuple[int, bool]] | None:
    """Return what an equation makes of an operand, and whether it adds to it; None if it does anything else."""
    if _adds(equation, operand):
        return [(equation.outputs[0], True)]
    if _passes_on(equation, operand):
        return [(equation.outputs[0], False)]
    found, bodies = [], list(_bodies(equation, operand))
    for body, place in bodies:
        sums = _sums_of(body, body.inputs[place])
        if sums is None:
            return None
        found += [
            (output, True) for output, number in zip(equation.outputs, body.outputs, strict=True) if number in sums
        ]
    return found if bodies else None


def _bodies(equation: Equation, operand: int) -> Iterator[tuple[Program, int]]:
    """Yield the programs that an equation holds, and the place that an operand has among their inputs."""
    params = equation.params
    if equation.name in ("remat2", "remat", "checkpoint") or (
        equation.name == "scan" and operand in internals.scan_places(params).carry
    ):
        yield flatten(internals.opened(params["jaxpr"])[0]), operand
    elif equation.name == "cond" and operand:
        for each in params["branches"]:
            yield flatten(internals.opened(each)[0]), operand - 1


def _adds(equation: Equation, operand: int) -> bool:
    return equation.name in _SUMS and (operand == 0 or not equation.name.startswith("scatter"))


def _passes_on(equation: Equation, operand: int) -> bool:
    """Return whether an equation gives an operand as it is, or times something."""
    name = equation.name
    return (
        name in _MOVES
        or name in ("mul", "neg")
        or (name, operand) == ("div", 0)
        or (name == "select_n" and operand > 0)
    )


def _chooses(step: Step) -> bool:
    """Return whether a sum may end with a choice between arrays; a number that 16 bits lack would be rounded there."""
    return step.equation.name == "select_n" and all(value.number is None for value in step.given)


def _users(program: Program) -> dict[int, list[tuple[int, int]]]:
    """Return, for each value, who takes it, and at which place of its operands."""
    users: dict[int, list[tuple[int, int]]] = {}
    for place, equation in enumerate(program.equations):
        for operand, number in enumerate(equation.inputs):
            users.setdefault(number, []).append((place, operand))
    return users
