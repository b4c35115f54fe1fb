"""Which equations are computed in FP32 because all that they feed wants FP32: `x - max` before `exp`.

A difference of close numbers in 16 bits has few exact digits, and what amplifies it gets none back. So an equation that
works element by element is raised if each user of its result has FP32 operands anyway, is raised itself, or only moves
elements to such users. So is what comes near a limit: `erf` in `1 + erf(x)`.
"""

from collections.abc import Iterator

from duotone.jax import primitives
from duotone.jax.casting.program import Program
from duotone.jax.casting.steps import Step
from duotone.jax.casting.values import Kind


def raised(program: Program, steps: list[Step]) -> tuple[frozenset[int], frozenset[int]]:
    """Return the places of equations to be raised, and of inputs wanted in FP32, given steps of which none is."""
    # who takes a value, and at which place of its operands
    users: dict[int, list[tuple[int, int]]] = {}
    makers: dict[int, str] = {}
    for place, step in enumerate(steps):
        makers.update(dict.fromkeys(step.equation.outputs, step.equation.name))
        for operand, number in enumerate(step.equation.inputs):
            users.setdefault(number, []).append((place, operand))
    outputs = frozenset(program.outputs)
    found: set[int] = set()
    # of those that want FP32 operands, the places
    wanting: set[int] = set()
    for place in range(len(steps) - 1, -1, -1):
        step = steps[place]
        if step.wants_float32 or _cancels(step, makers):
            wanting.add(place)
        if step.form not in ("pointwise", "move") or outputs & set(step.equation.outputs):
            continue
        feeds = [user for number in step.equation.outputs for user in users.get(number, ())]
        opinions = set(_opinions(steps, feeds, wanting))
        if opinions != {True}:
            continue
        wanting.add(place)
        if step.form == "pointwise" and any(value.kind is Kind.HALF for value in step.given):
            found.add(place)
    wanted = {
        place
        for place, number in enumerate(program.inputs)
        if number not in outputs and set(_opinions(steps, users.get(number, []), wanting)) == {True}
    }
    return frozenset(found), frozenset(wanted)


def _opinions(steps: list[Step], feeds: list[tuple[int, int]], wanting: set[int]) -> Iterator[bool]:
    """Yield whether each user wants FP32; comparisons have no opinion."""
    for place, operand in feeds:
        step = steps[place]
        if place in wanting or operand in step.wanted:
            yield True
        elif step.form == "pointwise" and any(value.kind is Kind.HELD for value in step.found):
            # another operand is held
            yield True
        elif step.form != "comparison":
            yield False


def _cancels(step: Step, makers: dict[int, str]) -> bool:
    """Return whether a number is added to what is near a limit."""
    return (
        step.equation.name in ("add", "sub")
        and any(value.number is not None for value in step.given)
        and any(makers.get(number) in primitives.BOUNDED for number in step.equation.inputs)
    )
