"""Runs a plan: casts operands, binds primitives, casts results; under any transform of JAX, for it only binds.

    with watching(callback):     callback(Observation) for every equation that runs, a loop's body once

Casts are not kept: two uses of a weight are two casts, which XLA makes one, and gradients of both are added in FP32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from duotone.jax import internals
from duotone.jax.casting import numbers
from duotone.jax.casting.marks import without_marks
from duotone.jax.casting.steps import Plan, Step


@dataclass(frozen=True, slots=True)
class Cast:
    """A cast that a rule put in.

    Attributes:
        source: the dtype before.
        target: the dtype after.
        n_bytes: the bytes of its result.
        of_result: whether a result was cast, not an operand.
    """

    source: Any
    target: Any
    n_bytes: int
    of_result: bool


@dataclass(frozen=True, slots=True)
class Observation:
    """An equation that ran.

    Attributes:
        step: what was decided for it, with its primitive, its scopes and its traced form.
        operands: shape and dtype of each operand as it was bound.
        results: shape and dtype of each result as it is used.
        casts: casts that were put in around it.
    """

    step: Step
    operands: Sequence[Any]
    results: Sequence[Any]
    casts: Sequence[Cast]

    @property
    def primitive(self) -> str:
        """The primitive's name."""
        return self.step.equation.name

    @property
    def scope(self) -> str:
        """The user's named scopes around it, as `blocks/norm`."""
        return "/".join(without_marks(self.step.equation.scopes))


Watcher = Callable[[Observation], None]

_WATCHER: ContextVar[Watcher | None] = ContextVar("duotone_jax_watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` with each equation that a function under autocast runs in the block, in this thread.

    An equation runs when it is traced: a function that `jax.jit` has compiled already runs none.
    """
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def run(plan: Plan, constants: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Return the outputs of a plan's program, in the dtypes that its values say.

    Args:
        plan: what to run.
        constants: the constants of its outermost program.
        args: its inputs, in the dtypes that `plan.inputs` say.
    """
    program = plan.program
    values: dict[int, Any] = dict(program.known)
    # since 0.11 constants of a program that does not hold them are inputs
    values.update(zip([*program.constants, *program.inputs], [*constants, *args], strict=True))
    watcher = _WATCHER.get()
    for step, last_used in zip(plan.steps, program.last_used, strict=True):
        given = [values[number] for number in step.equation.inputs]
        with internals.as_traced(step.equation.source, step.equation.name_stack):
            operands = _operands(step, given)
            found = _bound(step, operands)
            results = _results(step, found)
        if watcher is not None:
            watcher(_observed(step, given, operands, found, results))
        values.update(zip(step.equation.outputs, results, strict=True))
        # without a jit this is when memory is free again
        for number in last_used:
            del values[number]
    return [values[number] for number in program.outputs]


def _operands(step: Step, given: list[Any]) -> list[Any]:
    return [
        array if dtype is None else numbers.cast(array, dtype, value.number)
        for array, dtype, value in zip(given, step.operands, step.given, strict=True)
    ]


def _bound(step: Step, operands: list[Any]) -> list[Any]:
    if step.runner is not None:
        return step.runner(operands)
    return internals.bind(step.equation.source.primitive, operands, {**step.equation.params, **step.params})


def _results(step: Step, found: list[Any]) -> list[Any]:
    return [
        array if dtype is None else numbers.cast(array, dtype) for array, dtype in zip(found, step.results, strict=True)
    ]


def _observed(step: Step, given: list[Any], operands: list[Any], found: list[Any], results: list[Any]) -> Observation:
    pairs = [(*pair, False) for pair in zip(given, operands, strict=True)]
    pairs += [(*pair, True) for pair in zip(found, results, strict=True)]
    casts = [
        Cast(before.dtype, after.dtype, after.size * after.dtype.itemsize, of_result)
        for before, after, of_result in pairs
        if getattr(before, "dtype", None) != getattr(after, "dtype", None)
    ]
    return Observation(
        step, [internals.type_of(each) for each in operands], [internals.type_of(each) for each in results], casts
    )
