"""A program of JAX as a flat list of equations: inner jits are taken out, scopes written in full, values numbered.

What autocast decides of an equation depends on who uses its results. With inner jits taken out (`jnp.where`,
`jax.nn.silu` and many others of JAX's own are jits) those stand in one list. An inner jit with shardings stays.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from duotone.jax import internals


@dataclass(frozen=True, eq=False, slots=True)
class Equation:
    """A primitive, its parameters, and the numbers of its operands and results.

    Attributes:
        source: the equation of JAX: its primitive, parameters, line and context.
        inputs: the values that it is given.
        outputs: the values that it gives.
        name_stack: JAX's scopes and transforms around it, from the function's outermost on.
        scopes: the named scopes among them.
    """

    source: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    name_stack: Any
    scopes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.source.primitive.name

    @property
    def params(self) -> Mapping[str, Any]:
        """The primitive's parameters."""
        return self.source.params


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """Equations in order, over numbered values.

    Attributes:
        equations: all of them.
        constants: values of the outermost program that come with it.
        inputs: values that it is given.
        outputs: values that it gives.
        types: the traced type of each value.
        known: literals, and constants of inner programs, by value.
        last_used: for each equation, the values that nothing after it uses.
    """

    equations: Sequence[Equation]
    constants: Sequence[int]
    inputs: Sequence[int]
    outputs: Sequence[int]
    types: Sequence[Any]
    known: Mapping[int, Any] = field(default_factory=dict)
    last_used: Sequence[Sequence[int]] = ()


def flatten(jaxpr: Any, name_stack: Any = None, scopes: tuple[str, ...] = ()) -> Program:
    """Return an open jaxpr as a program; `name_stack` and `scopes` are those of the equation that holds it."""
    builder = _Builder()
    table: dict[Any, int] = {}
    constants = [builder.new(table, variable) for variable in jaxpr.constvars]
    inputs = [builder.new(table, variable) for variable in jaxpr.invars]
    equations = list(builder.equations(jaxpr, table, name_stack, scopes))
    outputs = [builder.read(table, atom) for atom in jaxpr.outvars]
    last_used = _last_used(equations, outputs)
    return Program(equations, constants, inputs, outputs, builder.types, builder.known, last_used)


def _last_used(equations: Sequence[Equation], outputs: Sequence[int]) -> list[list[int]]:
    seen = set(outputs)
    found = []
    for equation in reversed(equations):
        new = {*equation.inputs, *equation.outputs} - seen
        seen |= new
        found.append(sorted(new))
    return found[::-1]


class _Builder:
    """Numbers values while equations are gone through."""

    def __init__(self) -> None:
        self.types: list[Any] = []
        self.known: dict[int, Any] = {}

    def new(self, table: dict[Any, int], variable: Any) -> int:
        table[variable] = len(self.types)
        self.types.append(variable.aval)
        return table[variable]

    def read(self, table: dict[Any, int], atom: Any) -> int:
        if not isinstance(atom, internals.Literal):
            return table[atom]
        number = len(self.types)
        self.types.append(atom.aval)
        self.known[number] = internals.literal_value(atom)
        return number

    def equations(
        self, jaxpr: Any, table: dict[Any, int], outer_stack: Any, outer_scopes: tuple[str, ...]
    ) -> Iterator[Equation]:
        for source in jaxpr.eqns:
            own = internals.name_stack_of(source)
            stack = own if outer_stack is None else outer_stack + own
            scopes = outer_scopes + internals.scopes_of(own)
            inputs = tuple(self.read(table, atom) for atom in source.invars)
            inner = internals.called_program(source)
            if inner is None:
                outputs = tuple(self.new(table, variable) for variable in source.outvars)
                yield Equation(source, inputs, outputs, stack, scopes)
                continue
            opened, constants = internals.opened(inner)
            # variables of one program may be met again, for a jit that is called twice is the same program
            inner_table = dict(zip(opened.invars, inputs, strict=True))
            for variable, constant in zip(opened.constvars, constants, strict=True):
                self.known[self.new(inner_table, variable)] = constant
            yield from self.equations(opened, inner_table, stack, scopes)
            for outer, atom in zip(source.outvars, opened.outvars, strict=True):
                table[outer] = self.read(inner_table, atom)
