"""Modules of Flax and Equinox as arguments of a transform: what they change stays changed; which floats are weights.

A Flax NNX module keeps state in itself: the statistics of BatchNorm, the counts behind dropout's keys. A transform of
JAX flattens its arguments, so the function that it calls changes copies, and the changes are lost without a word.
`keeping_state` passes the state in and out by NNX's own `to_tree` and `from_tree`, as `nnx.jit` does. Linen, Haiku and
Equinox pass state as values; there is nothing to keep. Flax is seen only if somebody has imported it.
"""

import sys
from collections.abc import Callable, Mapping
from types import CellType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import tree_util

from duotone.errors import AutocastError

Evaluate = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

# the name of this transform among those of NNX that are at work
_CONTEXT = "duotone.autocast"


def keeping_state(evaluate: Evaluate) -> Evaluate:
    """Return an evaluation of functions that also keeps what they change in NNX modules among their arguments.

    It raises an `AutocastError` around a part of a Linen model.

    Args:
        evaluate: called with a function, its arguments and its keyword arguments, all pytrees of arrays; may trace the
            function. The function returns the state of modules (None without any) and its result, `evaluate` likewise.
    """

    def evaluated(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_inside_linen(function, args, kwargs):
            raise AutocastError(
                "autocast is around a part of a Linen model, whose variables Flax changes in place; put it around "
                "model.apply, and keep parts in FP32 by a rule for their scopes, such as 'Dense_0: compute=float32'"
            )
        nnx = _nnx()
        if nnx is None or not _has_modules(nnx, (args, kwargs)):
            return evaluate(lambda *args, **kwargs: (None, function(*args, **kwargs)), args, kwargs)[1]

        def pure(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = nnx.from_tree((args, kwargs), is_inner=True, ctxtag=_CONTEXT)
            result = function(*args, **kwargs)
            state, result = nnx.to_tree(((args, kwargs), result), ctxtag=_CONTEXT)
            return _modules_alone(nnx, state), result

        with nnx.update_context(_CONTEXT):
            pure_args, pure_kwargs = nnx.to_tree((args, kwargs), ctxtag=_CONTEXT)
            state, result = evaluate(pure, pure_args, pure_kwargs)
            state = _in_dtypes_of(_modules_alone(nnx, (pure_args, pure_kwargs)), state)
            # puts the state into the caller's modules
            return nnx.from_tree((state, result), is_inner=False, ctxtag=_CONTEXT)[1]

    return evaluated


def _in_dtypes_of(before: Any, after: Any) -> Any:
    """Return state with 16-bit variables in 16 bits again, which `autocast` traces in FP32: the weights."""
    dtypes = {path: leaf.dtype for path, leaf in tree_util.tree_leaves_with_path(before) if hasattr(leaf, "dtype")}

    def again(path: Any, leaf: Any) -> Any:
        is_widened = getattr(leaf, "dtype", None) == jnp.float32 and dtypes.get(path) in (jnp.bfloat16, jnp.float16)
        return leaf.astype(dtypes[path]) if is_widened else leaf

    return tree_util.tree_map_with_path(again, after)


def weight_leaves(tree: Any) -> list[bool]:
    """Return, for each leaf of an argument that holds weights, whether it is a weight; the others are state or data.

    Of NNX modules those are the leaves of `nnx.Param`, of Linen's variables the collection `params`, of others all.
    """
    nnx = _nnx()
    if nnx is not None:
        nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
        if any(isinstance(node, nnx.Variable) for node in nodes):
            return [isinstance(node, nnx.Param) for node in nodes for _ in jax.tree.leaves(node)]
    if isinstance(tree, Mapping) and "params" in tree:
        return [getattr(path[0], "key", None) == "params" for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [True] * len(jax.tree.leaves(tree))


def _is_inside_linen(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a Linen module that Flax is just running is a function, its object, its argument or around it."""
    linen = sys.modules.get("flax.linen")
    if linen is None:
        return False
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    found = [function, getattr(function, "__self__", None), *cells, *jax.tree.leaves((args, kwargs))]
    return any(isinstance(each, linen.Module) and each.scope is not None for each in found)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _nnx() -> ModuleType | None:
    return sys.modules.get("flax.nnx")


def _has_modules(nnx: ModuleType, tree: Any) -> bool:
    """Return whether there are objects of NNX that a function can change; a State is a tree of values."""
    kinds = (nnx.Pytree, nnx.Variable)
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, (*kinds, nnx.State)))
    return any(isinstance(node, kinds) for node in nodes)


def _modules_alone(nnx: ModuleType, tree: Any) -> Any:
    """Return a tree with None for whatever is no module's state: other arguments need not leave a function again."""

    def is_state(node: Any) -> bool:
        return isinstance(node, nnx.NodeStates)

    return jax.tree.map(lambda node: node if is_state(node) else None, tree, is_leaf=is_state)
