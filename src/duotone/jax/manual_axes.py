"""Which axes of a mesh a value differs along, inside of `shard_map`."""

from typing import Any

import jax


def varying_axes(value: Any) -> frozenset[str]:
    """Return the axes that a value differs along, as `shard_map` knows it by `check_vma`; none outside of it.

    >>> varying_axes(1.0)
    frozenset()
    """
    # JAX's printed types show it, as in float32[]{V:data}, but no public function returns it; 0.8 called it vma
    kind = jax.typeof(value)
    return frozenset(getattr(getattr(kind, "manual_axis_type", None), "varying", getattr(kind, "vma", ())))
