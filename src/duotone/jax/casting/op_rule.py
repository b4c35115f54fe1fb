"""Kinds for functions that the table does not know, and for primitives that a part of a function wants otherwise.

op_rule(function, kind)             a function of one's own: what is returned runs under the kind
with op_rule("exp", kind):          a primitive of JAX has another kind in a block of code
with op_rule({"exp": kind}):        several have
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar, overload

import jax
from jax.extend.core import Primitive

from duotone.errors import OperationError, nearest_names
from duotone.jax import internals, primitives
from duotone.jax.casting import marks
from duotone.operations import Kind, check_kind

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@overload
def op_rule(function: Mapping[str | Primitive, Kind]) -> AbstractContextManager[None]: ...
@overload
def op_rule(function: str | Primitive, kind: Kind) -> AbstractContextManager[None]: ...
@overload
def op_rule(function: Callable[Arguments, Result], kind: Kind) -> Callable[Arguments, Result]: ...
def op_rule(function: Any, kind: Kind | None = None) -> Any:
    """Give an operation a kind under `autocast`: a function of your own for good, a primitive in a block of code.

    - `relative = op_rule(relative, "float32")`: the arrays that the returned function is given are cast as the kind
      says, those in pytrees too. What it calls itself runs on what it is given.
    - `with op_rule("exp", "as_given"):` the primitive has this kind in the block, whoever binds it. The innermost block
      decides. `jax.make_jaxpr` shows the names of primitives.

    Outside of `autocast` nothing changes.

    Args:
        function: a function of arrays; a primitive or its name; or a mapping from those to kinds.
        kind: `"compute"`, `"float32"`, `"float32_inside"`, `"widest"` or `"as_given"`.

    Raises:
        OperationError: there is no such kind or no such primitive, or it is no function.

    >>> import jax, jax.numpy as jnp, duotone.jax as dj
    >>> relative = dj.op_rule(lambda x, y: (x - y) / y, "float32")
    >>> def forward(weight, x):
    ...     with dj.op_rule("exp", "as_given"):
    ...         return relative(jnp.exp(x @ weight), x)
    >>> print(dj.autocast(forward, "bf16")(jnp.eye(2), jnp.ones((1, 2))))
    [[1.71875 1.71875]]
    """
    if isinstance(function, Mapping):
        if kind is not None:
            raise OperationError("a mapping given to op_rule holds the kinds itself; leave out the second argument")
        return _Block({_named(each): check_kind(its_kind) for each, its_kind in function.items()})
    if isinstance(function, str | Primitive):
        return _Block({_named(function): check_kind(_given(kind))})
    if isinstance(function, type) or not callable(function):
        raise OperationError(
            f'op_rule takes a function or the name of a primitive of JAX, such as "exp", not {function!r:.60}'
        )
    checked = check_kind(_given(kind))

    @functools.wraps(function)
    def under_kind(*args: Any, **kwargs: Any) -> Any:
        token = marks.new_token()
        args, kwargs = crossed((args, kwargs), checked, token)
        with marks.as_given_scope():
            found = function(*args, **kwargs)
        return crossed(found, "way_out", token) if checked == "float32_inside" else found

    return under_kind


def crossed(tree: Any, kind: str, token: int = -1) -> Any:
    """Return a pytree whose floating-point arrays have crossed a border."""
    leaves, structure = jax.tree.flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if internals.is_floating_array(leaf)]
    for place, array in zip(places, marks.cross([leaves[place] for place in places], kind, token), strict=True):
        leaves[place] = array
    return jax.tree.unflatten(structure, leaves)


class _Block:
    """A block of code in which primitives have other kinds; it may be entered again inside of itself."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        scope = marks.kinds_scope(self._kinds)
        scope.__enter__()
        self._entered.append(scope)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def _given(kind: Kind | None) -> Kind:
    if kind is None:
        raise OperationError('op_rule needs the kind of the function, too: op_rule(function, "float32"), for instance')
    return kind


def _named(primitive: str | Primitive) -> str:
    """Return the name of a primitive to which a kind can be given."""
    name = primitive.name if isinstance(primitive, Primitive) else primitive
    can_have = frozenset(primitives.kinds()) | primitives.POINTWISE
    if name not in can_have:
        raise OperationError(
            f"autocast gives no kind to a primitive {name!r:.60}; {nearest_names(str(name), sorted(can_have)):.200}"
        )
    return name
