"""Sums over gradients, on a CPU piece by piece: what XLA's compiler for CPUs would convert to FP32 as a whole before.

    sums[leaf] += function(piece)    for every piece of every leaf

One loop goes through the pieces of all leaves of a dtype: compiling takes time for each loop, not for each turn.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from duotone.jax import internals
from duotone.jax.optim import pieces


def sum_in_pieces(
    function: Callable[[jax.Array], jax.Array], arrays: Sequence[jax.Array], is_true: jax.Array
) -> list[jax.Array]:
    """Return `function` of each array, whose pieces' results can be added.

    Args:
        function: of a piece in any shape, and 0 for zeros; its results are FP32, of one shape.
        arrays: of any shape.
        is_true: bool, 0-d: always True, but XLA must not see it.
    """
    if not pieces.are_possible() or all(map(internals.is_concrete, arrays)):
        return [function(array) for array in arrays]
    length = pieces.piece_length(sum(array.size for array in arrays))
    zero = jnp.zeros_like(jax.eval_shape(function, jax.ShapeDtypeStruct((1,), jnp.float32)))

    def in_pieces(is_true: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        sums: dict[int, jax.Array] = {}
        small: list[int] = []
        large: dict[np.dtype, list[int]] = {}
        for index, array in enumerate(arrays):
            is_large = length < array.size <= pieces.LARGEST_SIZE
            (large.setdefault(array.dtype, []) if is_large else small).append(index)
        for indices in large.values():
            totals = _in_one_loop(function, [arrays[index] for index in indices], length, zero, is_true)
            sums.update(zip(indices, totals, strict=True))
        for batch in pieces.batches(small, [arrays[index].size for index in small], length):
            given = [arrays[index] for index in batch]
            # a condition keeps XLA from converting whole arrays before it
            found = lax.cond(is_true, lambda *each: [*map(function, each)], lambda *each: [zero] * len(each), *given)
            sums.update(zip(batch, found, strict=True))
        return [sums[index] for index in range(len(arrays))]

    def whole(_: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        return [function(array) for array in arrays]

    return lax.platform_dependent(is_true, *arrays, cpu=in_pieces, default=whole)


def _in_one_loop(
    function: Callable[[jax.Array], jax.Array],
    arrays: Sequence[jax.Array],
    length: int,
    zero: jax.Array,
    is_true: jax.Array,
) -> jax.Array:
    """Return `function` of each array, stacked; all have one dtype and more elements than a piece."""
    turns = [(leaf, place) for leaf, array in enumerate(arrays) for place in range(-(-array.size // length))]
    leaf_of, place_of = (jnp.asarray(column, jnp.int32) for column in np.transpose(turns))

    def add(turn: jax.Array, sums: jax.Array) -> jax.Array:
        leaf, first = leaf_of[turn], place_of[turn] * length

        def cut(array: jax.Array) -> Callable[[], jax.Array]:
            # the last piece begins before its place, so that it is as long as the others
            start = jnp.minimum(first, array.size - length)
            is_new = start + lax.iota(jnp.int32, length) >= first
            return lambda: jnp.where(is_new, lax.dynamic_slice(array.reshape(-1), (start,), (length,)), 0)

        nothing = [lambda: jnp.zeros(length, arrays[0].dtype)]
        piece = lax.switch(jnp.where(is_true, 1 + leaf, 0), nothing + [cut(array) for array in arrays])
        is_its_own = jnp.arange(len(arrays)).reshape(-1, *[1] * zero.ndim) == leaf
        return sums + jnp.where(is_its_own, function(piece), 0)

    return lax.fori_loop(0, len(turns), add, jnp.zeros((len(arrays), *zero.shape), zero.dtype))
