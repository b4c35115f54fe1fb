"""What all ranks must agree on before a step, in one collective: the norm, what is not finite, whether the loss was.

Where XLA partitions a program (GSPMD), there is one program and nothing to agree on. Inside of `shard_map` each rank
holds its own part of a gradient, or a whole one. Which it is, JAX knows by `check_vma`, and the axes that a gradient
varies along are summed over. With `check_vma=False`, under `pmap` and under `vmap` nothing says so but the user's
`axis_name`, and then it holds for all gradients.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from duotone.errors import OptimizerError
from duotone.jax.internals import varying_axes

AxisName = str | tuple[str, ...] | None


def summed_over_ranks(vectors: Sequence[jax.Array], axis_name: AxisName) -> list[jax.Array]:
    """Return vectors of FP32, each summed over the ranks that hold different parts of it.

    Args:
        vectors: 1-d.
        axis_name: what they are summed over where JAX does not know.

    Raises:
        OptimizerError: no such axis is there.

    >>> summed = jax.vmap(lambda x: summed_over_ranks([x], "ranks")[0], axis_name="ranks")
    >>> summed(jnp.float32([[1.0, 2.0], [3.0, 4.0]]))
    Array([[4., 6.],
           [4., 6.]], dtype=float32)
    """
    unchecked = _unchecked(axis_name)
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, vector in enumerate(vectors):
        axes = tuple(sorted(varying_axes(vector))) or unchecked
        groups.setdefault(axes, []).append(index)
    summed = dict(enumerate(vectors))
    for axes, indices in groups.items():
        if axes:
            together = lax.psum(jnp.concatenate([vectors[index] for index in indices]), axes)
            ends = [sum(vectors[index].size for index in indices[: count + 1]) for count in range(len(indices) - 1)]
            summed.update(zip(indices, jnp.split(together, ends), strict=True))
    return [summed[index] for index in range(len(vectors))]


def _unchecked(axis_name: AxisName) -> tuple[str, ...]:
    """Return those of the named axes along which JAX does not follow what varies."""
    names: Any = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    try:
        return tuple(name for name in names if not varying_axes(lax.axis_index(name)))
    except NameError as error:
        raise OptimizerError(
            f"axis_name={axis_name!r} names no axis here; leave it out of masters where XLA partitions the program, or "
            "call tx.update inside of the shard_map, pmap or vmap that has the axis"
        ) from error
