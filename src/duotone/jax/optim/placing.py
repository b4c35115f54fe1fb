"""Where a new optimizer state lies: each of its arrays beside the parameter that it belongs to.

Optax makes moments of zeros, which depend on nothing. Under `jit` XLA therefore gives every device all of them, 8 bytes
for each parameter where a quarter of it was asked for; run by itself, `init` follows its arguments. So each array of
the parameters' shape that stands at a parameter's path is made to depend on that parameter, in a way that changes no
number and that XLA does not see through before it has chosen shardings. `jax.experimental.shard_alike` did the same
before JAX 0.12.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import tree_util
from jax.sharding import AxisType

from duotone.jax import internals


def placed_beside(state: Any, params: Any) -> Any:
    """Return an optimizer's new state, its arrays placed as the parameters that they belong to.

    Args:
        state: any pytree. An array belongs to the parameter of its shape whose path is the end of its own.
        params: what the state was made of.

    >>> params = {"w": jnp.ones(3)}
    >>> state = jax.jit(lambda params: placed_beside({"mu": {"w": jnp.zeros(3)}, "count": 0}, params))(params)
    >>> state["mu"]["w"], state["count"]
    (Array([0., 0., 0.], dtype=float32), Array(0, dtype=int32, weak_type=True))
    """
    # where shardings are part of types, an array of zeros has that of what it is like
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return state
    leaves = {path: leaf for path, leaf in tree_util.tree_leaves_with_path(params) if not internals.is_concrete(leaf)}
    lengths = sorted({len(path) for path in leaves}, reverse=True)

    def place(path: tuple[Any, ...], array: Any) -> Any:
        ends = (path[len(path) - length :] for length in lengths if length <= len(path))
        owner = next((leaves[end] for end in ends if end in leaves), None)
        if owner is None or jnp.shape(owner) != jnp.shape(array) or not jnp.shape(array):
            return array
        if not jnp.issubdtype(owner.dtype, jnp.inexact) or jnp.issubdtype(array.dtype, jax.dtypes.extended):
            return array
        is_true = jnp.isnan(owner) | (jnp.abs(owner) >= 0)
        return jnp.where(is_true, array, jnp.ones_like(array))

    return tree_util.tree_map_with_path(place, state)
