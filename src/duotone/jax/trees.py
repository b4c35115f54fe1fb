"""Pytrees as Duotone reads them: every leaf with its path as dotted text, and what holds it.

`{"blocks": [{"kernel": w}]}` has the leaf `blocks.0.kernel`. Paths are those of the model's own modules in every
library: the collection `params` of Flax Linen, the `~` of Haiku and the level inside of a box around one array, such
as a variable of NNX, are left out.
Flax and Equinox are recognised only where they are loaded already.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import tree_util

# what these are called says nothing about a model, and a state of NNX is one
_PLAIN = (Mapping, list)
_LANGUAGE = {"builtins", "abc", "collections.abc", "typing"}
_PARAMS = "params"


@dataclass(frozen=True)
class Leaf:
    """A leaf of a pytree.

    Attributes:
        path: dotted text.
        value: the leaf itself.
        owner: the container that holds it; the leaf itself if it is the whole tree. Boxes around a single array,
            such as a variable of NNX and `linen.Partitioned`, are looked through.
        variable: the NNX variable that it is the value of, or None.
        is_state: whether it is in Equinox's state of a model, such as running statistics.
        collection: the collection of Flax Linen that it is in, where the tree is a dict of such, or None.
    """

    path: str
    value: Any
    owner: Any
    variable: Any = None
    is_state: bool = False
    collection: str | None = None


def leaves_of(tree: Any) -> list[Leaf]:
    """Return the leaves of any pytree, in JAX's order.

    >>> [leaf.path for leaf in leaves_of({"params": {"mlp/~/linear": {"w": 1.0, "b": 2.0}}})]
    ['mlp.linear.b', 'mlp.linear.w']
    """
    is_linen = _is_linen(tree)
    found = []
    for names, value, holders in _walk(tree, (), (tree,)):
        collection = names[0] if is_linen else None
        variable = next((holder for holder in reversed(holders) if is_nnx_variable(holder)), None)
        owner = next((holder for holder in reversed(holders) if not _is_box(holder)), value)
        is_state = any(_is_of("equinox.nn", name, holder) for holder in holders for name in ("State", "StateIndex"))
        path = _text(names[1:] if collection == _PARAMS else names)
        found.append(Leaf(path, value, owner, variable, is_state, collection))
    return found


def map_leaves(function: Callable[[Leaf], Any], tree: Any) -> Any:
    """Return a pytree with `function`'s results in the place of its leaves; a module of NNX is a new one.

    >>> map_leaves(lambda leaf: leaf.path, {"a": [1, 2]})
    {'a': ['a.0', 'a.1']}
    """
    if is_nnx_module(tree):
        nnx = sys.modules["flax.nnx"]
        # a variable that stands in two places stays one
        graph, state = nnx.split(tree)
        return nnx.merge(graph, map_leaves(function, state))
    return tree_util.tree_structure(tree).unflatten([function(leaf) for leaf in leaves_of(tree)])


def classes_of(tree: Any) -> dict[str, tuple[str, ...]]:
    """Return the names of each container's class and of its base classes, by path; plain containers have none.

    >>> import equinox as eqx, jax
    >>> classes_of({"head": eqx.nn.Linear(1, 1, key=jax.random.key(0))})["head"]
    ('Linear', 'Module')
    """
    found: dict[str, tuple[str, ...]] = {}
    for names, _, holders in _walk(tree, (), (tree,)):
        for depth, holder in enumerate(holders[: len(names)]):
            if not isinstance(holder, _PLAIN) and not _is_box(holder):
                found.setdefault(_text(names[:depth]), _class_names(type(holder)))
    return {path: names for path, names in found.items() if names}


def is_floating(leaf: Any) -> bool:
    """Return whether a leaf is an array of real floating-point numbers; a Python number is none.

    >>> is_floating(jnp.ones(2)), is_floating(1.0), is_floating(jnp.arange(2))
    (True, False, False)
    """
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def is_nnx_variable(node: Any) -> bool:
    """Return whether `node` is a variable of Flax NNX."""
    return _is_of("flax.nnx", "Variable", node)


def is_nnx_param(node: Any) -> bool:
    """Return whether `node` is a trainable variable of Flax NNX."""
    return _is_of("flax.nnx", "Param", node)


def is_nnx_module(node: Any) -> bool:
    """Return whether `node` is a module of Flax NNX."""
    return _is_of("flax.nnx", "Module", node)


def is_equinox_module(node: Any) -> bool:
    """Return whether `node` is a module of Equinox."""
    return _is_of("equinox", "Module", node)


def children_of(node: Any) -> list[tuple[Any, Any]]:
    """Return the children of a container as pairs of JAX's key and child; a leaf has none."""
    pairs = tree_util.tree_flatten_with_path(node, is_leaf=lambda each: each is not node)[0]
    return [(path[0], child) for path, child in pairs if path]


def _walk(node: Any, names: tuple[str, ...], holders: tuple[Any, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield names, value and containers of every leaf; the containers begin with the tree itself."""
    children = children_of(node)
    if not children:
        # a container without children has no leaf
        if tree_util.all_leaves([node]):
            yield names, node, holders[:-1]
        return
    for key, child in children:
        own = () if _is_box(node) else (_name(key),)
        yield from _walk(child, (*names, *own), (*holders, child))


def _is_box(node: Any) -> bool:
    return is_nnx_variable(node) or _is_of("flax.core.meta", "AxisMetadata", node)


def _name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key).strip(".[]'\"")


def _text(names: tuple[str, ...]) -> str:
    parts = [part for name in names for part in name.split("/") if part not in ("", "~")]
    return ".".join(parts)


def _is_linen(tree: Any) -> bool:
    return isinstance(tree, Mapping) and isinstance(tree.get(_PARAMS), Mapping)


def _class_names(kind: type) -> tuple[str, ...]:
    return tuple(each.__name__ for each in kind.__mro__ if each.__module__ not in _LANGUAGE)


def _is_of(module: str, name: str, node: Any) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(node, kind)
