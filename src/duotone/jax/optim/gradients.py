"""Gradients as `masters` takes them: true ones, checked, read once for their norm and for what is not finite.

    big = sum (2^-96 g)^2 is finite exactly where every g is; the norm comes from it where sum g^2 overflows

Where a loss scale is in use, the gradient of a 16-bit weight in 16 bits is one that was never scaled, or that nobody
has unscaled, and is refused: `duotone.jax.value_and_grad` returns FP32. The gradient of an FP32 weight is FP32 either
way, and tells nothing.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from duotone.errors import OptimizerError
from duotone.jax.optim.agreement import AxisName, summed_over_ranks
from duotone.jax.optim.leaves import is_split, is_trained
from duotone.jax.optim.sums import sum_in_pieces

_BIG = 2.0**-96


def check_gradient(path: str, leaf: Any, grad: Any, *, is_scaled: bool) -> None:
    """Raise if a gradient cannot be that of a parameter.

    Args:
        path: of the parameter.
        leaf: the parameter.
        grad: its gradient.
        is_scaled: whether the optimizer has a loss scale.

    Raises:
        OptimizerError: its dtype or shape is another, or it was not unscaled.
    """
    if not is_trained(leaf):
        return
    own = getattr(leaf, "dtype", jnp.dtype(jnp.float32))
    dtype, shape = getattr(grad, "dtype", type(grad).__name__), getattr(grad, "shape", ())
    allowed = {own, jnp.dtype(jnp.float32)} if is_split(leaf) else {own}
    is_number = isinstance(leaf, float) and isinstance(grad, float)
    if (dtype not in allowed and not is_number) or shape != jnp.shape(leaf):
        names = " or ".join(sorted(map(str, allowed)))
        raise OptimizerError(
            f'the gradient of "{path}" is {dtype} of shape {shape}, but its parameter is {own} of shape '
            f"{jnp.shape(leaf)}; its gradient must be {names} of that shape"
        )
    if is_scaled and is_split(leaf) and dtype == own:
        raise OptimizerError(
            f'the gradient of "{path}" is {dtype}, but this optimizer has a loss scale and takes true gradients, in '
            "float32; take those of duotone.jax.value_and_grad(loss_fn)(state, params, ...), which scales the loss and "
            "unscales them"
        )


def read_gradients(
    grads: Sequence[jax.Array],
    loss_is_finite: jax.Array | bool = True,
    *,
    weights: Sequence[jax.Array] = (),
    axis_name: AxisName = None,
    is_true: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return what the gradients of all ranks say: their norm, whether each is finite, whether the loss was.

    Args:
        grads: of any shapes and floating or complex dtypes.
        loss_is_finite: bool, 0-d.
        weights: that may hold an Inf, as the last step left them.
        axis_name: see `summed_over_ranks`.
        is_true: see `sum_in_pieces`.

    Returns:
        The norm of all gradients together, FP32, 0-d; for each of them whether it holds an Inf or a NaN;
        `loss_is_finite`; and for each of the weights whether it holds an Inf. All are the same on all ranks.

    >>> norm, non_finite, *_ = read_gradients([jnp.float32([3.0, 4.0]), jnp.bfloat16([jnp.inf])])
    >>> norm.item(), non_finite.tolist()
    (inf, [False, True])
    >>> round(read_gradients([jnp.float32([3e30, 4e30])])[0].item() / 5e30, 6)
    1.0
    """

    def sums_of_squares(grad: jax.Array) -> jax.Array:
        # FP64 is made small before it is made FP32
        magnitude = jnp.abs(grad.astype(jnp.float32) if is_split(grad) else jnp.asarray(grad))
        squares = [jnp.square(each.astype(jnp.float32)) for each in (magnitude, magnitude * _BIG)]
        return jnp.stack([jnp.sum(each) for each in squares])

    bad_losses = 1 - jnp.asarray(loss_is_finite, jnp.float32).reshape(1)
    own = sum_in_pieces(sums_of_squares, grads, jnp.asarray(is_true))
    counts = sum_in_pieces(_infinities, weights, jnp.asarray(is_true))
    *pairs, bad_losses = summed_over_ranks([*own, *counts, bad_losses], axis_name)
    pairs, counts = pairs[: len(own)], pairs[len(own) :]
    sums, bigs = jnp.stack(pairs).T if pairs else jnp.zeros((2, 0), jnp.float32)
    total = sums.sum()
    norm = jnp.where(jnp.isfinite(total), jnp.sqrt(total), jnp.sqrt(bigs.sum()) / _BIG)
    infinite = jnp.concatenate(counts) > 0 if counts else jnp.zeros(0, bool)
    return norm, ~jnp.isfinite(bigs), bad_losses[0] == 0, infinite


def _infinities(weight: jax.Array) -> jax.Array:
    return jnp.sum(jnp.isinf(weight), dtype=jnp.float32).reshape(1)


def for_inner(grad: Any, master: Any, multiplier: jax.Array | None) -> Any:
    """Return a gradient as the inner optimizer sees it: FP32 beside an FP32 master, clipped; None beside None."""
    if master is None:
        return None
    wide = grad.astype(jnp.float32) if is_split(grad) else jnp.asarray(grad)
    return wide if multiplier is None else wide * multiplier.astype(wide.real.dtype)
