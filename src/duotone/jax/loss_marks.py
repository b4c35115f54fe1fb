"""How gradients say that the loss itself was not finite: each of them is a NaN of one bit pattern.

The optimizer must know, for then no loss scale can help. Gradients are all that it is given, and they stay a plain
pytree of the parameters' structure, so that whatever users do with gradients goes on to work. The pattern is one of the
quiet NaNs, none that arithmetic makes, and the same in every format but for its length: FP16 widened to FP32 keeps it.
So do sums and products on CPUs, but for those in BF16. GPUs return a NaN of their own from arithmetic: after a `pmean`
there it is an overflow like any other, unless the update is given the loss, as Optax's `value`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# the quiet bit, and after it 101101: neither 000000, as x86, TPUs and XLA make NaNs, nor 111111, as NVIDIA does
_PATTERNS = {"float16": 0x7F68, "bfloat16": 0x7FED, "float32": 0x7FED0000, "float64": 0x7FFDA00000000000}
_BITS = {name: np.dtype(f"uint{np.dtype(jnp.dtype(name)).itemsize * 8}") for name in _PATTERNS}


def mark(grads: Any, loss_is_finite: jax.Array) -> Any:
    """Return the gradients, or, where the loss was not finite, the mark in place of each number.

    Args:
        grads: any pytree; leaves of FP16, BF16, FP32 and FP64 are marked.
        loss_is_finite: bool, 0-d.

    >>> jnp.isnan(mark({"w": jnp.ones(2)}, jnp.bool_(False))["w"])
    Array([ True,  True], dtype=bool)
    """

    def marked(grad: Any) -> Any:
        return _marked(grad, loss_is_finite) if str(getattr(grad, "dtype", None)) in _PATTERNS else grad

    return jax.tree.map(marked, grads)


def is_marked(grads: Any) -> jax.Array:
    """Return whether the loss of these gradients was not finite: bool, 0-d. One number is read, of the smallest leaf.

    >>> grads = mark([jnp.ones(2)], jnp.bool_(False))
    >>> bool(is_marked(grads)), bool(is_marked([jnp.full(2, jnp.nan)]))
    (True, False)
    """
    leaves = [leaf for leaf in jax.tree.leaves(grads) if str(getattr(leaf, "dtype", None)) in _PATTERNS and leaf.size]
    if not leaves:
        return jnp.bool_(False)
    smallest = min(leaves, key=lambda leaf: leaf.size)
    name = str(smallest.dtype)
    bits = lax.bitcast_convert_type(smallest[(0,) * smallest.ndim], _BITS[name])
    # without the sign, which a factor of -1 turns
    return (bits & _BITS[name].type(2 ** (8 * _BITS[name].itemsize - 1) - 1)) == _BITS[name].type(_PATTERNS[name])


@jax.custom_jvp
def _marked(grad: jax.Array, loss_is_finite: jax.Array) -> jax.Array:
    # chosen among integers: XLA's CPU compiler chooses BF16 in FP32, and its conversions make one NaN of all
    name = str(grad.dtype)
    bits = lax.bitcast_convert_type(grad, _BITS[name])
    return lax.bitcast_convert_type(jnp.where(loss_is_finite, bits, _BITS[name].type(_PATTERNS[name])), grad.dtype)


@_marked.defjvp
def _marked_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    # a bit pattern has no derivative; gradients of gradients need one
    return _marked(*primals), jnp.where(primals[1], tangents[0], 0)
