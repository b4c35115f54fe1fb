"""What autocast has decided for a program: a step for each equation, before anything runs.

A plan is made of kinds and types alone, without tracing, so that loops settle quickly; `interpreter` carries it out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from duotone.jax.casting.program import Equation, Program
from duotone.jax.casting.values import Value

# the operands of an equation, cast, to its results
Runner = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """An equation, what its operands are cast to, and what its results are.

    Attributes:
        equation: the equation.
        given: what its operands are.
        operands: what each operand is cast to; None to take it as it is.
        found: what its results are.
        results: what each result is cast to; None to leave it.
        params: parameters that differ from the traced ones.
        runner: what runs it, if it is not simply bound.
        wants_float32: whether it computes in FP32 for a reason of its own, so that exact operands are worth having.
        form: "pointwise" if it can be computed in FP32 on demand, "move" if it gives what it is given.
        wanted: the places of operands that the programs that it holds want in FP32.
        inner: the plans of the programs that it holds, for those who read plans.
    """

    equation: Equation
    given: Sequence[Value]
    operands: Sequence[Any]
    found: Sequence[Value]
    results: Sequence[Any]
    params: Mapping[str, Any] = field(default_factory=dict)
    runner: Runner | None = None
    wants_float32: bool = False
    form: str = ""
    wanted: frozenset[int] = frozenset()
    inner: Sequence["Plan"] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """A program with a step for each equation.

    Attributes:
        program: the program.
        steps: one for each of its equations.
        inputs: what its inputs are, in which dtypes they must come.
        outputs: what its outputs are.
        compute: the 16-bit format.
        wanted: the places of inputs that are worth having in FP32, since all that they feed wants it.
    """

    program: Program
    steps: Sequence[Step]
    inputs: Sequence[Value]
    outputs: Sequence[Value]
    compute: Any
    wanted: frozenset[int] = frozenset()
