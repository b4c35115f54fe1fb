"""Adds up the equations of a traced program: operations, casts and who asked for them, scopes, what is saved.

A cast is the code's own if the program without autocast has one to the same dtype at the same place (line, column and
scopes), and the policy's otherwise. `jnp.sum` of 16 bits widens them by itself, and so are 16 bits beside FP32: that is
why it is looked up with weights as they are and with weights in FP32, as autocast traces them.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, reduce
from operator import and_
from pathlib import Path
from typing import Any

from jax.extend import source_info_util

from duotone.jax.explanation.equations import CAST, Equation, Equations
from duotone.jax.explanation.records import Output, Residual, Scope
from duotone.jax.primitives import MOVES, kinds
from duotone.wording.records import Cast, Operation, SavedForBackward, add_up, largest_first

_FLOATS = ("float64", "float32", "bfloat16", "float16")
# they give what they are given, so their dtypes say nothing
_SILENT = MOVES | {CAST, "broadcast_in_dim", "broadcast_to", "pad"}
# the user's own line is outside of libraries of layers
_LIBRARIES = ("flax", "equinox", "haiku", "optax")

Place = tuple[str, str, str]
# the reason why an equation computes in FP32, or None
Reason = Callable[[Equation], str | None]


def operations_of(program: Equations, reason: Reason) -> tuple[Operation, ...]:
    """Return what computes, the most called first."""
    scopes: defaultdict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    lines: defaultdict[tuple[Any, ...], dict[str, None]] = defaultdict(dict)
    for equation in program.all:
        compute, result = _compute_dtype(equation), _result_dtype(equation)
        if compute is None or equation.name in _SILENT:
            continue
        key = equation.name, kinds().get(equation.name), compute, result or "no float", reason(equation)
        scopes[key][equation.scope] += equation.times
        if line := source_line(equation):
            lines[key][line] = None
    found = [
        Operation(name, kind, compute, result, counted.total(), False, dict(counted), tuple(lines[key]), why)
        for key, counted in scopes.items()
        for name, kind, compute, result, why in [key]
    ]
    return tuple(sorted(found, key=lambda each: -each.calls))


def casts_of(program: Equations, written: Sequence[Equations]) -> tuple[Cast, ...]:
    """Return the casts between floating-point dtypes, the largest first.

    Args:
        program: what runs.
        written: the function as it is written, for weights of either dtype; what the code casts, it casts in all.
    """
    by_code = reduce(and_, map(_places, written))
    casts = []
    for equation, place in _casts(program):
        is_own = by_code[place] > 0
        by_code[place] -= equation.times
        user = program.user(equation.outputs[0])
        casts.append(
            Cast(
                from_dtype=str(equation.source.invars[0].aval.dtype),
                to_dtype=str(equation.source.outvars[0].aval.dtype),
                by="model" if is_own else "duotone",
                module=equation.scope,
                operation="astype" if is_own else user and user.name,
                source_line=source_line(equation),
                calls=equation.times,
                result_bytes=equation.times * bytes_of(equation.source.outvars[0].aval),
            )
        )
    return largest_first(casts)


def outputs_of(program: Equations, outvars: Sequence[Any]) -> tuple[Output, ...]:
    """Return the outputs that a last cast brought into another dtype than they were computed in."""
    found = []
    for number, atom in zip(program.outputs, outvars, strict=True):
        maker = None if number is None else program.maker(number)
        if maker is not None and maker.name == CAST:
            aval, computed = atom.aval, maker.source.invars[0].aval.dtype
            found.append(Output(str(aval.dtype), str(computed), tuple(aval.shape), bytes_of(aval)))
    return tuple(found)


def residuals_of(program: Equations, outvars: Sequence[Any], inputs: Sequence[str]) -> tuple[Residual, ...]:
    """Return what the outputs of a program are, each array once, the largest first.

    Args:
        program: whose outputs are saved for the backward pass.
        outvars: JAX's variables of the outputs.
        inputs: what each input of the program is called.
    """
    named = dict(zip(program.inputs, inputs, strict=True))
    found = []
    for variable, number in {v: n for v, n in zip(outvars, program.outputs, strict=True) if n is not None}.items():
        aval, maker = variable.aval, program.maker(number)
        if not hasattr(aval, "dtype"):
            continue
        scope, line = (maker.scope, source_line(maker)) if maker else ("", None)
        origin = _origin(program, number, named)
        found.append(Residual(str(aval.dtype), tuple(aval.shape), origin, scope, line, 1, bytes_of(aval)))
    return tuple(sorted(add_up(found), key=lambda each: -each.result_bytes))


def _origin(program: Equations, number: int | None, named: Mapping[int, str]) -> str:
    maker = None if number is None else program.maker(number)
    if maker is None:
        argument = None if number is None else named.get(number)
        return "constant" if argument is None else f"argument {argument}"
    if maker.name == "name":
        return f'name "{maker.source.params["name"]}"'
    return f"cast of {_origin(program, maker.inputs[0], named)}" if maker.name == CAST else maker.name


def saved_of(residuals: Sequence[Residual], weights: Collection[str]) -> SavedForBackward:
    """Return what is saved by dtype.

    Args:
        residuals: what is saved.
        weights: origins of those that are weights.
    """
    activations, parameters, outside = Counter[str](), Counter[str](), Counter[str]()
    for each in residuals:
        (parameters if each.origin in weights else activations)[each.dtype] += each.result_bytes
        if each.origin not in weights and not each.scope:
            outside[each.dtype] += each.result_bytes
    return SavedForBackward(dict(activations), dict(parameters), dict(outside))


def scopes_of(program: Equations, residuals: Sequence[Residual], weights: Collection[str]) -> tuple[Scope, ...]:
    """Return the named scopes, in the order in which they are entered first, those around them before them."""
    counts, dtypes, saved = Counter[str](), defaultdict[str, dict[str, None]](dict), defaultdict(Counter[str])
    order: dict[str, None] = {}
    for equation in program.all:
        names = equation.scope.split(".") if equation.scope else []
        order.update(dict.fromkeys(".".join(names[: depth + 1]) for depth in range(len(names))))
        dtype = _compute_dtype(equation)
        if dtype is not None and equation.name not in _SILENT:
            counts[equation.scope] += equation.times
            dtypes[equation.scope][dtype] = None
    for each in residuals:
        if each.scope and each.origin not in weights:
            order[each.scope] = None
            saved[each.scope][each.dtype] += each.result_bytes
    return tuple(Scope(path, counts[path], tuple(dtypes[path]), dict(saved[path])) for path in order)


def bytes_of(aval: Any) -> int:
    """Return the bytes of an array by its abstract value; a PRNG key is one of its words."""
    return aval.size * aval.dtype.itemsize


def source_line(equation: Equation) -> str | None:
    """Return `file:line` of the user's code that an equation comes from, None if there is none."""
    info = equation.source.source_info
    return None if info.traceback is None else _user_line(source_info_util.summarize(info, num_frames=100))


@cache
def _user_line(frames: str) -> str | None:
    # innermost last; a frame is "file:line:column (function)", or "unknown"
    lines = [frame.rpartition(" (")[0].rpartition(":")[0] for frame in frames.splitlines() if " (" in frame]
    # what Duotone does at the border of a function is no line of anybody's
    if not lines or lines[-1].startswith(_folders("duotone")):
        return None
    own = [line for line in lines if not line.startswith(_folders(*_LIBRARIES))]
    return _short((own or lines)[-1])


def _folders(*modules: str) -> tuple[str, ...]:
    files = (getattr(sys.modules.get(name), "__file__", None) for name in modules)
    return tuple(f"{Path(file).parent}/" for file in files if file)


def _short(line: str) -> str:
    path, here = Path(line), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_absolute() and path.is_relative_to(here) else line


def _places(program: Equations) -> Counter[Place]:
    """Return how many casts stand in each place."""
    places = Counter[Place]()
    for equation, place in _casts(program):
        places[place] += equation.times
    return places


def _casts(program: Equations) -> Iterator[tuple[Equation, Place]]:
    """Yield the casts between floating-point dtypes and where they stand."""
    for equation in program.all:
        if equation.name == CAST:
            before, after = equation.source.invars[0].aval.dtype, equation.source.outvars[0].aval.dtype
            if before != after and str(before) in _FLOATS and str(after) in _FLOATS:
                yield equation, (source_info_util.summarize(equation.source.source_info), equation.scope, str(after))


def _compute_dtype(equation: Equation) -> str | None:
    """Return the widest floating-point dtype that an equation reads, or makes if it reads none."""
    for atoms in (equation.source.invars, equation.source.outvars):
        found = [dtype for dtype in map(_float, atoms) if dtype]
        if found:
            return min(found, key=_FLOATS.index)
    return None


def _result_dtype(equation: Equation) -> str | None:
    return next((dtype for dtype in map(_float, equation.source.outvars) if dtype), None)


def _float(atom: Any) -> str | None:
    dtype = str(getattr(atom.aval, "dtype", ""))
    return dtype if dtype in _FLOATS else None
