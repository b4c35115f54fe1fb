"""A program of JAX as a flat list of equations: whatever holds a program is taken out, and each value is one number.

The inside of a scan counts as often as it runs, that of a `while_loop` once, for nobody knows how often; of a `cond`
every branch counts once; a `shard_map` is as one device sees it. Kernels and callbacks stay what they are. A cast to a
wider dtype and back changes no bit, and XLA drops it, so it is left out.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from duotone.jax import internals
from duotone.jax.casting.marks import border_p, without_marks
from duotone.jax.primitives import MOVES, PROGRAMS

CAST = "convert_element_type"
_WIDER = {"bfloat16": ("float32", "float64"), "float16": ("float32", "float64"), "float32": ("float64",)}
# they pass on what they are given, in another shape
_MOVES = MOVES | {"broadcast_in_dim", "broadcast_to", "pad"}


@dataclass(frozen=True, slots=True, eq=False)
class Equation:
    """A primitive with numbers for its operands and results.

    Attributes:
        source: the equation of JAX.
        inputs: its operands; None for a number that is written in the program.
        outputs: its results.
        scopes: the named scopes around it.
        times: how often it runs.
    """

    source: Any
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    scopes: tuple[str, ...]
    times: int

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.source.primitive.name

    @property
    def scope(self) -> str:
        """The named scopes as text, as rules name them; `einsum` names its own after its formula, which is left out."""
        names = (name for name in without_marks(self.scopes) if "->" not in name)
        return ".".join(name.replace("/", ".") for name in names)


@dataclass(eq=False)
class Equations:
    """All equations of a program, and which values are its inputs, constants and outputs.

    Attributes:
        all: the equations, in the order in which they run.
        inputs: a number for each input.
        constants: a number for each constant.
        outputs: a number for each output; None for a number that is written in the program.
    """

    all: list[Equation] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()
    outputs: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        self._makers: dict[int, Equation] = {}
        self._users: dict[int, list[Equation]] = {}

    def maker(self, number: int) -> Equation | None:
        """Return the equation that made a value, None for inputs and constants."""
        return self._makers.get(number)

    def user(self, number: int) -> Equation | None:
        """Return the first equation that computes with a value; what only moves or casts it is looked through."""
        for equation in self._users.get(number, ()):
            if equation.name != CAST and equation.name not in _MOVES:
                return equation
            if found := self.user(equation.outputs[0]):
                return found
        return None

    def drop_unused_casts(self) -> None:
        """Leave out casts whose results nothing takes, for what took them was left out."""
        used = {number for equation in self.all for number in equation.inputs} | set(self.outputs)
        self.all = [each for each in self.all if each.name != CAST or used.intersection(each.outputs)]

    def add(self, equation: Equation) -> None:
        """Take in an equation."""
        self.all.append(equation)
        for number in equation.outputs:
            self._makers[number] = equation
        for number in equation.inputs:
            if number is not None:
                self._users.setdefault(number, []).append(equation)


def equations_of(program: Any) -> Equations:
    """Return the equations of a jaxpr, closed or open."""
    return _Flattening().run(program)


class _Flattening:
    """Numbers values while it goes through a program and those inside it."""

    def __init__(self) -> None:
        self.found = Equations()
        self._count = 0

    def run(self, program: Any) -> Equations:
        jaxpr, _ = internals.opened(program)
        table: dict[Any, int] = {}
        self.found.constants = self._named(table, jaxpr.constvars)
        self.found.inputs = self._named(table, jaxpr.invars)
        self._walk(jaxpr, table, (), 1)
        self.found.outputs = tuple(_read(table, atom) for atom in jaxpr.outvars)
        self.found.drop_unused_casts()
        return self.found

    def _walk(self, jaxpr: Any, table: dict[Any, int], outer: tuple[str, ...], times: int) -> None:
        for source in jaxpr.eqns:
            scopes = outer + internals.scopes_of(internals.name_stack_of(source))
            inputs = tuple(_read(table, atom) for atom in source.invars)
            # a border of keep_float32 or op_rule, which is nothing where nobody casts
            results = list(inputs) if source.primitive is border_p else None
            for program, given, repeats in _programs(source):
                inner_jaxpr, _ = internals.opened(program)
                inner: dict[Any, int] = {}
                self._named(inner, [*inner_jaxpr.constvars, *inner_jaxpr.invars])
                for variable, place in zip(inner_jaxpr.invars, given, strict=False):
                    number = None if place is None else inputs[place]
                    if number is not None:
                        inner[variable] = number
                self._walk(inner_jaxpr, inner, scopes, times * repeats)
                if results is None and len(inner_jaxpr.outvars) == len(source.outvars):
                    results = [_read(inner, atom) for atom in inner_jaxpr.outvars]
            if results is None:
                outputs = self._named(table, source.outvars)
                before = self._before_widening(source, inputs)
                if before is not None:
                    table[source.outvars[0]] = before
                elif not any(True for _ in _programs(source)):
                    self.found.add(Equation(source, inputs, outputs, scopes, times))
                continue
            for variable, number in zip(source.outvars, results, strict=True):
                table[variable] = self._new() if number is None else number

    def _before_widening(self, source: Any, inputs: Sequence[int | None]) -> int | None:
        """Return the value that a cast gives back because it undoes a widening; None if it does not."""
        maker = self.found.maker(inputs[0]) if source.primitive.name == CAST and inputs[0] is not None else None
        if maker is None or maker.name != CAST:
            return None
        dtypes = maker.source.invars[0].aval.dtype, maker.source.outvars[0].aval.dtype
        is_exact = str(dtypes[1]) in _WIDER.get(str(dtypes[0]), ())
        return maker.inputs[0] if is_exact and source.outvars[0].aval.dtype == dtypes[0] else None

    def _named(self, table: dict[Any, int], variables: Iterable[Any]) -> tuple[int, ...]:
        numbers = []
        for variable in variables:
            table[variable] = self._new()
            numbers.append(table[variable])
        return tuple(numbers)

    def _new(self) -> int:
        self._count += 1
        return self._count


def _programs(source: Any) -> Iterator[tuple[Any, Sequence[int | None], int]]:
    """Yield the programs that an equation runs, the operand that each of their inputs is, and how often they run."""
    name, params = source.primitive.name, source.params
    if name not in PROGRAMS:
        return
    places: Sequence[int | None] = range(len(source.invars))
    if name == "scan":
        # the carry is what the body made of it
        carry = internals.scan_places(params).carry
        yield params["jaxpr"], [None if place in carry else place for place in places], params["length"]
    elif name == "while":
        for key in ("cond_jaxpr", "body_jaxpr"):
            yield params[key], (), 1
    else:
        # the first operand of a cond says which branch
        for value in params.values():
            for each in value if isinstance(value, tuple) else (value,):
                if internals.is_program(each):
                    yield each, places[1:] if name == "cond" else places, 1


def _read(table: dict[Any, int], atom: Any) -> int | None:
    return None if isinstance(atom, internals.Literal) else table[atom]
