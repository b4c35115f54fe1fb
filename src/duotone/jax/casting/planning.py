"""Makes the plan of a program: a step for each equation, twice, for what feeds FP32 rules alone is raised."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp

from duotone.jax import internals, policies, primitives
from duotone.jax.casting import demands, kinds, marks, numbers, sums
from duotone.jax.casting.custom_rules import CUSTOM_RULES
from duotone.jax.casting.loops import LOOPS
from duotone.jax.casting.program import Equation, Program, flatten
from duotone.jax.casting.regions import REGIONS
from duotone.jax.casting.site import Handler, Site
from duotone.jax.casting.steps import Plan, Step
from duotone.jax.casting.values import HALF, HELD, OPEN, Kind, Value, is_float
from duotone.policy import Policy

_PROGRAMS: Mapping[str, Handler] = MappingProxyType({**LOOPS, **CUSTOM_RULES, **REGIONS})


class Planner:
    """Makes plans under one policy, and keeps those that it has made.

    Attributes:
        policy: the policy.
        compute: its 16-bit format.
        residual: what residual streams start in.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.compute = jnp.dtype(policy.compute)
        self.residual = policy.residual
        self._plans: dict[Any, tuple[Any, Plan]] = {}
        self._programs: dict[Any, tuple[Any, Program]] = {}
        self._float32_scopes: dict[tuple[str, ...], bool] = {}
        self._rounds: dict[int, bool] = {}

    def plan(self, jaxpr: Any, given: Sequence[Value], scopes: tuple[str, ...] = ()) -> Plan:
        """Return the plan of an open jaxpr.

        Args:
            jaxpr: the program.
            given: what its constants and, after them, its inputs are.
            scopes: the named scopes around it.
        """
        key = (id(jaxpr), tuple(given), scopes)
        if key not in self._plans:
            # the program is kept, so that no other one gets its id
            self._plans[key] = (jaxpr, self._planned(self._program(jaxpr, scopes), list(given)))
        return self._plans[key][1]

    @property
    def scopes(self) -> set[tuple[str, ...]]:
        """The user's named scopes in all programs that were planned."""
        programs = (program for _, program in self._programs.values())
        return {marks.without_marks(each.scopes) for program in programs for each in program.equations}

    def _program(self, jaxpr: Any, scopes: tuple[str, ...]) -> Program:
        key = (id(jaxpr), scopes)
        if key not in self._programs:
            self._programs[key] = (jaxpr, flatten(jaxpr, scopes=scopes))
        return self._programs[key][1]

    def _planned(self, program: Program, given: list[Value]) -> Plan:
        steps, values = self._steps(program, given)
        places, wanted = demands.raised(program, steps)
        parts, ends = sums.parts(program, steps)
        if places or parts:
            steps, values = self._steps(program, given, places | parts, ends)
        outputs = [values[number] for number in program.outputs]
        return Plan(program, steps, given[len(program.constants) :], outputs, self.compute, wanted)

    def _steps(
        self,
        program: Program,
        given: list[Value],
        raised: frozenset[int] = frozenset(),
        ends: frozenset[int] = frozenset(),
    ) -> tuple[list[Step], dict[int, Value]]:
        values = {number: self.constant(value) for number, value in program.known.items()}
        values.update(zip([*program.constants, *program.inputs], given, strict=True))
        steps = []
        for place, equation in enumerate(program.equations):
            own = [values[number] for number in equation.inputs]
            site = Site.of(self, program, equation, own, is_raised=place in raised, ends_sum=place in ends)
            step = self._step(site)
            steps.append(step)
            values.update(zip(equation.outputs, step.found, strict=True))
        return steps, values

    def constant(self, constant: Any) -> Value:
        """Return what a literal, or an array that a program closes over, is.

        A number is open. What JAX traces is a weight of a transform around this one; an array whose values are known is
        a constant, as a buffer in torch is.
        """
        traced = internals.type_of(constant)
        if not is_float(traced, self.compute):
            # an integer may be made a float, as the 0 of jnp.pad is
            return Value(Kind.OTHER, numbers.integer_of(constant))
        if traced.dtype == self.compute:
            return Value(Kind.HALF)
        if not internals.is_concrete(constant):
            return OPEN
        found = numbers.number_of(constant)
        return HELD if found is None else Value(Kind.OPEN, found)

    def _step(self, site: Site) -> Step:
        name = site.equation.name
        if name == marks.border_p.name:
            return marks.border(site, self._rounds)
        if name in _PROGRAMS:
            return _PROGRAMS[name](site)
        if not site.floats:
            if name == "convert_element_type":
                return site.step(None, kinds.convert(site).found)
            # nothing to cast; a float that comes of no float, such as random bits in 16-bit, is data
            is_half = [getattr(traced, "dtype", None) == self.compute for traced in site.types_out]
            return site.step(None, [HALF if each else HELD for each in is_half])
        return self._handler(site)(site)

    def _handler(self, site: Site) -> Handler:
        name = site.equation.name
        if name == "convert_element_type":
            return kinds.convert
        if site.has_foreign or name not in primitives.known() or name in primitives.TRACED:
            return kinds.as_traced
        if name in primitives.MOVES or name in primitives.COMPARISONS:
            return kinds.handler_of(name)
        kind = marks.kind_in(site.equation.scopes, name)
        if kind is None and self._is_float32(site.equation):
            kind = "float32"
        return kinds.handler_of(name) if kind is None else kinds.handler_for(kind, name)

    def _is_float32(self, equation: Equation) -> bool:
        scopes = equation.scopes
        if scopes not in self._float32_scopes:
            self._float32_scopes[scopes] = policies.computes_float32(self.policy, marks.without_marks(scopes))
        return self._float32_scopes[scopes]
