"""Which results of an optimizer's program are computed element by element, so that any piece of them can be.

AdamW's new moments, weight and tail of one parameter are functions of the old ones and of the gradient at the same
place, and of scalars. Norms of whole layers, products of matrices, statistics of rows and columns are not: they are
computed as they stand, and a part reads them. Found in the jaxpr, so that any optimizer of Optax has its parts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax

from duotone.jax import internals

# every element of the result depends on the element at the same place of each operand, or on a scalar
_NAMES = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp convert_element_type
    copy cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max
    min mul ne neg nextafter not or pow population_count real reduce_precision rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
ELEMENTWISE = frozenset(_NAMES.split())


@dataclass(frozen=True)
class Part:
    """Equations that compute some results of a program, of one shape, element by element.

    Attributes:
        results: their places among the program's results.
        variables: the results themselves.
        arrays: what is read at the same place: operands of the program, or results of other equations.
        scalars: what is read whole.
        equations: in order.
        shape: of the results and the arrays.
    """

    results: tuple[int, ...]
    variables: tuple[Any, ...]
    arrays: tuple[Any, ...]
    scalars: tuple[Any, ...]
    equations: tuple[Any, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements each of the arrays has."""
        return math.prod(self.shape)

    def compute(self, pieces: Mapping[Any, Any], scalars: Mapping[Any, Any]) -> list[Any]:
        """Return a piece of each result, given the same piece, flat, of each array."""
        # of flat pieces all of one length
        length = next(iter(pieces.values())).shape
        values = {**scalars, **pieces}
        for equation in self.equations:
            operands = read(equation.invars, values)
            if equation.primitive.name == "broadcast_in_dim":
                values[equation.outvars[0]] = lax.broadcast(operands[0], length)
            else:
                values[equation.outvars[0]] = internals.bind(equation.primitive, operands, equation.params)[0]
        return read(self.variables, values)


def flattened(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """Run a program with the programs that it calls in place of the calls.

    Functions with derivatives of their own lose them.

    Args:
        jaxpr: an open one.
        operands: those that its constants stand for first.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), operands, strict=True))
    for equation in jaxpr.eqns:
        called = internals.called_program(equation)
        if equation.primitive.name == "custom_jvp_call":
            called = equation.params["call_jaxpr"]
        given = read(equation.invars, values)
        if called is None:
            results = internals.bind(equation.primitive, given, equation.params)
        else:
            inner, constants = internals.opened(called)
            results = flattened(inner, [*constants, *given])
        values.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars, values)


def find_parts(jaxpr: Any, is_paired: Sequence[bool]) -> list[Part]:
    """Return the parts of an open jaxpr whose results all take the place of an operand.

    Args:
        jaxpr: without calls, see `flattened`.
        is_paired: for each result, whether it may take the place of an operand of its shape and dtype.
    """
    makers = {equation.outvars[0]: equation for equation in jaxpr.eqns if is_elementwise(equation)}
    joined = _Groups()
    for result, equation in makers.items():
        for variable in equation.invars:
            if not isinstance(variable, internals.Literal) and variable.aval.shape:
                joined.join(result, variable)
    groups: dict[Any, list[int]] = {}
    for place, variable in enumerate(jaxpr.outvars):
        if not isinstance(variable, internals.Literal) and variable in joined:
            groups.setdefault(joined.find(variable), []).append(place)
    found = [
        _part(jaxpr, places, makers)
        for places in groups.values()
        if all(is_paired[place] and jaxpr.outvars[place] in makers for place in places)
    ]
    return [part for part in found if part.arrays and part.size]


def is_elementwise(equation: Any) -> bool:
    """Return whether an equation computes one array of one or more dimensions element by element."""
    result = equation.outvars[0].aval if len(equation.outvars) == 1 else None
    if result is None or not internals.is_array_type(result) or not result.shape or equation.effects:
        return False
    operands = [variable.aval for variable in equation.invars]
    if not all(internals.is_array_type(operand) and operand.shape in ((), result.shape) for operand in operands):
        return False
    name = equation.primitive.name
    if name == "broadcast_in_dim":
        return operands[0].shape == ()
    # of a scalar alone nothing of this shape is made otherwise
    return name in ELEMENTWISE and any(operand.shape for operand in operands)


def run_for(jaxpr: Any, wanted: Iterable[Any], operands: Sequence[Any]) -> dict[Any, Any]:
    """Return the values of some variables, and of all that they need; nothing else is run.

    Args:
        jaxpr: an open one.
        wanted: variables of it, or literals.
        operands: those that its constants stand for first.
    """
    needed = {variable for variable in wanted if not isinstance(variable, internals.Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            kept.append(equation)
            needed.update(each for each in equation.invars if not isinstance(each, internals.Literal))
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), operands, strict=True))
    for equation in reversed(kept):
        results = internals.bind(equation.primitive, read(equation.invars, values), equation.params)
        values.update(zip(equation.outvars, results, strict=True))
    return values


def read(variables: Iterable[Any], values: Mapping[Any, Any]) -> list[Any]:
    """Return the values of variables and literals."""
    return [
        internals.literal_value(each) if isinstance(each, internals.Literal) else values[each] for each in variables
    ]


def _part(jaxpr: Any, places: Sequence[int], makers: Mapping[Any, Any]) -> Part:
    variables = tuple(jaxpr.outvars[place] for place in places)
    wanted, arrays, scalars, equations = set(variables), {}, {}, []
    for equation in reversed(jaxpr.eqns):
        result = equation.outvars[0] if equation.outvars else None
        if result in wanted and result in makers:
            equations.append(equation)
            wanted.update(each for each in equation.invars if not isinstance(each, internals.Literal))
    made = {equation.outvars[0] for equation in equations}
    for variable in wanted - made:
        (arrays if variable.aval.shape else scalars)[variable] = None
    shape = variables[0].aval.shape
    return Part(tuple(places), variables, tuple(arrays), tuple(scalars), tuple(reversed(equations)), shape)


class _Groups:
    """Sets of variables that grow together (union-find)."""

    def __init__(self) -> None:
        self._parents: dict[Any, Any] = {}

    def __contains__(self, variable: Any) -> bool:
        return variable in self._parents

    def find(self, variable: Any) -> Any:
        """Return the one variable that stands for all of its group."""
        self._parents.setdefault(variable, variable)
        while self._parents[variable] is not variable:
            self._parents[variable] = self._parents[self._parents[variable]]
            variable = self._parents[variable]
        return variable

    def join(self, one: Any, other: Any) -> None:
        """Make one group of two."""
        self._parents[self.find(one)] = self.find(other)
