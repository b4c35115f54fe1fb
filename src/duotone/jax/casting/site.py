"""One equation while its step is decided: what its operands are, and the few shapes that a decision has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp

from duotone.jax import primitives
from duotone.jax.casting import numbers
from duotone.jax.casting.program import Equation, Program
from duotone.jax.casting.steps import Plan, Runner, Step
from duotone.jax.casting.values import FLOAT32, HALF, HELD, OPEN, OTHER, Kind, Value, dtype_of, is_float


class Planner(Protocol):
    """What makes plans, as those see it that plan programs inside of programs."""

    compute: Any
    residual: str

    def constant(self, constant: Any) -> Value:
        """Return what an array is that a program closes over."""
        ...

    def plan(self, jaxpr: Any, given: Sequence[Value], scopes: tuple[str, ...]) -> Plan:
        """Return the plan of an open jaxpr whose constants and inputs are `given`."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """An equation, what it is given, and whether its result is wanted in FP32.

    Attributes:
        planner: what plans the programs that it holds.
        equation: the equation.
        given: what its operands are.
        types: the traced types of its operands.
        types_out: the traced types of its results.
        is_raised: whether all that its results feed wants FP32.
        ends_sum: whether a sum ends with it that is computed in FP32 so far.
    """

    planner: Planner
    equation: Equation
    given: Sequence[Value]
    types: Sequence[Any]
    types_out: Sequence[Any]
    is_raised: bool
    ends_sum: bool

    @classmethod
    def of(
        cls,
        planner: Planner,
        program: Program,
        equation: Equation,
        given: Sequence[Value],
        *,
        is_raised: bool,
        ends_sum: bool,
    ) -> "Site":
        """Return the site of an equation of a program."""
        types, types_out = ([program.types[number] for number in each] for each in (equation.inputs, equation.outputs))
        return cls(planner, equation, given, types, types_out, is_raised, ends_sum)

    @property
    def compute(self) -> Any:
        """The 16-bit format."""
        return self.planner.compute

    @property
    def floats(self) -> list[int]:
        """The places of operands that are cast at all."""
        return [place for place, value in enumerate(self.given) if value.kind is not Kind.OTHER]

    @property
    def float_values(self) -> list[Value]:
        """What those are."""
        return [self.given[place] for place in self.floats]

    @property
    def has_foreign(self) -> bool:
        """Whether an operand is FP64, FP8, complex or in the other 16-bit format."""
        return any(
            value.kind is Kind.OTHER and jnp.issubdtype(getattr(traced, "dtype", jnp.int32), jnp.inexact)
            for value, traced in zip(self.given, self.types, strict=True)
        )

    def has(self, kind: Kind) -> bool:
        """Return whether an operand is of a kind."""
        return any(value.kind is kind for value in self.given)

    def step(
        self,
        cast_to: Any,
        found: Value | Sequence[Value],
        *,
        is_rounded: bool = False,
        params: Mapping[str, Any] | None = None,
        runner: Runner | None = None,
        wants_float32: bool = False,
        form: str = "",
        wanted: frozenset[int] = frozenset(),
        inner: Sequence[Plan] = (),
    ) -> Step:
        """Return the step that casts all float operands to a dtype.

        Args:
            cast_to: that dtype; None to take operands as they are; or one of these for each operand.
            found: what float results are, or what each result is.
            is_rounded: whether FP32 results are rounded to 16 bits.
            params: parameters that differ.
            runner: what runs it.
            wants_float32: see `Step`.
            form: see `Step`.
            wanted: see `Step`.
            inner: see `Step`.
        """
        targets = cast_to if isinstance(cast_to, list) else [cast_to] * len(self.given)
        operands = [
            None
            if target is None or value.kind is Kind.OTHER or dtype_of(value, traced, self.compute) == target
            else target
            for value, traced, target in zip(self.given, self.types, targets, strict=True)
        ]
        values = [found] * len(self.types_out) if isinstance(found, Value) else list(found)
        values = [
            value if is_float(traced, self.compute) else OTHER
            for value, traced in zip(values, self.types_out, strict=True)
        ]
        results = [self.compute if is_rounded and value.kind is Kind.HALF else None for value in values]
        return Step(
            self.equation,
            self.given,
            operands,
            values,
            results,
            params or {},
            runner,
            wants_float32,
            form,
            wanted,
            inner,
        )

    def as_traced(self, runner: Runner | None = None) -> Step:
        """Return the step that runs on the dtypes that were traced; FP32 results are as open as operands; sums held."""
        targets: list[Any] = [getattr(traced, "dtype", None) for traced in self.types]
        values = self.float_values
        is_sum = self.equation.name in primitives.SUMMED
        is_open = bool(values) and not is_sum and all(value.kind is not Kind.HELD for value in values)
        found = [
            HALF if getattr(traced, "dtype", None) == self.compute else OPEN if is_open else HELD
            for traced in self.types_out
        ]
        return self.step(targets, found, runner=runner)

    def in_float32(self, *, wants: bool = True, form: str = "pointwise") -> Step:
        """Return the step that computes in FP32, and whose result stays so."""
        return self.step(FLOAT32, HELD, wants_float32=wants, form=form)

    def rounded(self, form: str = "") -> Step:
        """Return the step that computes in FP32 and rounds its result to 16 bits."""
        return self.step(FLOAT32, Value(Kind.HALF), is_rounded=True, form=form)

    def in_compute(self, form: str = "", params: Mapping[str, Any] | None = None) -> Step:
        """Return the step that computes in 16 bits."""
        return self.step(self.compute, Value(Kind.HALF), form=form, params=params)

    def numbers(self) -> list[float]:
        """Return the numbers among its operands."""
        return [value.number for value in self.float_values if value.number is not None]

    def has_inexact(self) -> bool:
        """Return whether some open operand is no 16-bit number, so that it is exact only in FP32."""
        return any(
            value.kind is Kind.OPEN and not value.narrow
            if value.number is None
            else not numbers.is_exact(value.number, self.compute)
            for value in self.float_values
        )


Handler = Callable[[Site], Step]
