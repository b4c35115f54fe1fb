"""How a part of a function tells `autocast` that it is special: a named scope around it, and borders to cross.

Named scopes and primitives go through every transform of JAX and into every program that it makes, backward passes
among them. A border is a primitive that gives what it is given, and leaves no trace in what is compiled.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from duotone.jax.casting.site import Site
from duotone.jax.casting.steps import Step
from duotone.jax.casting.values import FLOAT32, HALF, HELD, OPEN, Kind
from duotone.operations import Kind as OperationKind

_PREFIX = "duotone."
_FLOAT32 = f"{_PREFIX}keep_float32"
_AS_GIVEN = f"{_PREFIX}as_given"
_KINDS = f"{_PREFIX}kinds "
_tokens = itertools.count()


def float32_scope() -> AbstractContextManager[Any]:
    """Return a scope in which all operations that have a kind are FP32."""
    return jax.named_scope(_FLOAT32)


def as_given_scope() -> AbstractContextManager[Any]:
    """Return a scope in which all operations take what they are given."""
    return jax.named_scope(_AS_GIVEN)


def kinds_scope(kinds: Mapping[str, OperationKind]) -> AbstractContextManager[Any]:
    """Return a scope in which primitives have other kinds."""
    return jax.named_scope(_KINDS + " ".join(f"{name}={kind}" for name, kind in kinds.items()))


def without_marks(scopes: Sequence[str]) -> tuple[str, ...]:
    """Return the named scopes that are the user's.

    >>> without_marks(["head", "duotone.keep_float32"])
    ('head',)
    """
    return tuple(scope for scope in scopes if not scope.startswith(_PREFIX))


def kind_in(scopes: Sequence[str], name: str) -> OperationKind | None:
    """Return the kind that the innermost mark gives a primitive; None if no mark speaks of it.

    >>> kind_in(["duotone.keep_float32", "duotone.kinds exp=as_given"], "exp"), kind_in(["head"], "exp")
    ('as_given', None)
    """
    for scope in reversed(scopes):
        if scope == _FLOAT32:
            return "float32"
        if scope == _AS_GIVEN:
            return "as_given"
        if scope.startswith(_KINDS):
            for named, kind in _pairs(scope):
                if named == name:
                    return kind
    return None


def _pairs(scope: str) -> Iterator[tuple[str, Any]]:
    for pair in scope.removeprefix(_KINDS).split():
        name, _, kind = pair.partition("=")
        yield name, kind


border_p = Primitive("duotone_border")
border_p.multiple_results = True


def new_token() -> int:
    """Return a number for a pair of borders, the way in and the way out of one call."""
    return next(_tokens)


def cross(arrays: Sequence[Any], kind: str, token: int = -1) -> list[Any]:
    """Return arrays as they are; under autocast cast as a kind says, or rounded as what the token's call was given."""
    return list(border_p.bind(*arrays, kind=kind, token=token)) if arrays else []


@border_p.def_impl
def _unchanged(*arrays: Any, **_: Any) -> list[Any]:
    return list(arrays)


@border_p.def_abstract_eval
def _types(*types: Any, **_: Any) -> list[Any]:
    return list(types)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    return border_p.bind(*primals, **params), list(tangents)


def _batched(arrays: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[list[Any], Sequence[Any]]:
    return border_p.bind(*arrays, **params), axes


ad.primitive_jvps[border_p] = _jvp
batching.primitive_batchers[border_p] = _batched
mlir.register_lowering(border_p, lambda _, *operands, **__: list(operands))


def border(site: Site, rounds: dict[int, bool]) -> Step:
    """Plan a border; `rounds` keeps, by token, whether a call's results are rounded on its way out."""
    kind, token = site.equation.params["kind"], site.equation.params["token"]

    def runner(operands: list[Any]) -> list[Any]:
        return operands

    if kind == "way_out":
        values = [HALF if rounds.get(token) else value for value in site.given]
        return site.step(site.compute if rounds.get(token) else None, values, runner=runner)
    is_held, is_half = site.has(Kind.HELD), site.has(Kind.HALF)
    rounds[token] = kind == "float32_inside" and is_half and not is_held
    if kind == "compute":
        return site.step(site.compute, HALF, runner=runner)
    if kind in ("float32", "float32_inside") or (kind == "widest" and is_held):
        return site.step(FLOAT32, HELD, runner=runner)
    if kind == "widest":
        return site.step(site.compute, HALF, runner=runner) if is_half else site.step(None, OPEN, runner=runner)
    return site.step(None, site.given, runner=runner)
