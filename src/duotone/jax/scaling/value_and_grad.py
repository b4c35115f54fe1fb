"""Gradients of a scaled loss, made true at once: `jax.value_and_grad` for FP16.

    grads = float32(gradient of (float32(loss) * scale)) / scale

The scale is a power of two, so the division is exact. It is the scale that these gradients were multiplied by, whatever
becomes of the state until they are used. XLA fuses it into what reads the gradients, which stay 16-bit in memory.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from duotone.errors import LossScaleError
from duotone.jax.internals import varying_axes
from duotone.jax.loss_marks import mark
from duotone.jax.loss_scale import note_scaled_loss
from duotone.jax.optim.state import state_in
from duotone.jax.scaling.differentiation import value_and_grad_of
from duotone.jax.scaling.reading import loss_scale_of
from duotone.policy import Policy


def value_and_grad(
    function: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False, **others: Any
) -> Callable[..., Any]:
    """Return a function of the optimizer's state and `function`'s arguments, which returns its value and gradients.

    It is `jax.value_and_grad`, but for this: the loss is multiplied by the state's loss scale in FP32 on the way to the
    gradients, and they are divided by it. What comes back are the true loss and true gradients, a plain pytree like the
    parameters: sum them over micro-batches, average them over devices, clip and log them as you like. They are in FP32
    where a loss is scaled or the policy says `grad=float32`, else in the dtypes of the parameters. An overflow is
    a NaN there, for the optimizer to find. If the loss itself was Inf or NaN, all gradients are NaNs that say so.

    Modules of Flax NNX are differentiated by `nnx.value_and_grad`, those of Equinox by `equinox.filter_value_and_grad`.

    Args:
        function: returns the loss, one floating-point number, first. It may be `autocast`'s.
        argnums: which arguments of `function` to differentiate; they are counted without the state.
        has_aux: whether `function` returns a pair of the loss and something else.
        others: of `jax.value_and_grad` or `nnx.value_and_grad`, such as `allow_int`.

    Returns:
        A function of a state, or anything that holds one such as a TrainState or an `nnx.Optimizer`, and the arguments
        of `function`. It returns `(loss, grads)`, or `((loss, aux), grads)`, and composes with every transform of JAX.

    Raises:
        OptimizerError: when called: the first argument holds no state of `masters`, or several.
        LossScaleError: when called: the loss is not one floating-point number.

    >>> import optax
    >>> import duotone.jax as dj
    >>> tx = dj.masters(optax.sgd(0.1), "fp16,loss_scale=1024")
    >>> params = {"w": jnp.float32([3.0])}
    >>> state = tx.init(params)
    >>> params = dj.cast(params, "fp16")
    >>> loss, grads = dj.value_and_grad(lambda params, x: (params["w"] * x).sum())(state, params, jnp.float16(2.0))
    >>> loss, grads["w"]
    (Array(6., dtype=float16), Array([2.], dtype=float32))
    """

    @wraps(function, updated=())
    def wrapped(state: Any, *args: Any, **kwargs: Any) -> Any:
        found = state_in(state)
        scale = loss_scale_of(found).scale

        # with the signature of the function, by which NNX finds arguments that are given by name
        @wraps(function, updated=())
        def scaled(*args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, Any]]:
            loss, aux = _split(function(*args, **kwargs), has_aux)
            # a loss in FP64 stays so
            wide = loss.astype(jnp.promote_types(loss.dtype, jnp.float32))
            return wide if found.settings.is_none else wide * scale, (loss, aux)

        differentiate = value_and_grad_of(args, argnums)
        (_, (loss, aux)), grads = differentiate(scaled, argnums=argnums, has_aux=True, **others)(*args, **kwargs)
        if not found.settings.is_none:
            note_scaled_loss()
            grads = jax.tree.map(lambda grad: _true(grad, scale), grads)
        elif Policy.parse(found.policy).grad == "float32":
            grads = jax.tree.map(lambda grad: _true(grad, None), grads)
        return ((loss, aux) if has_aux else loss), _marked(grads, loss)

    # what it takes is one argument more: jit counts static arguments by the signature
    del wrapped.__wrapped__
    return wrapped


def _split(result: Any, has_aux: bool) -> tuple[jax.Array, Any]:
    """Return the loss and the rest of what a function returned."""
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        got = f"{len(result)} values" if isinstance(result, tuple) else "one value"
        raise LossScaleError(
            f"with has_aux=True the function returns a pair of the loss and something else, but it returned {got}; "
            "return (loss, aux), or leave has_aux out"
        )
    loss, aux = result if has_aux else (result, None)
    if isinstance(loss, tuple | list | dict):
        raise LossScaleError(
            f"the loss is a {type(loss).__name__}; return one number, or (loss, aux) and write has_aux=True"
        )
    loss = jnp.asarray(loss)
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise LossScaleError(f"a loss must be a floating-point number, not {loss.dtype}")
    if loss.shape:
        raise LossScaleError(f"the loss has shape {loss.shape}, not (); take its mean or its sum")
    return loss, aux


def _marked(grads: Any, loss: jax.Array) -> Any:
    """Return the gradients with the loss's mark.

    Inside of `shard_map` the gradients of parameters that all devices share are summed over the devices already, and
    must stay the same on all: so each is marked where the loss of any of those devices is not finite.
    """
    is_finite = jnp.isfinite(loss)

    def marked(grad: Any) -> Any:
        axes = tuple(sorted(varying_axes(loss) - varying_axes(grad)))
        return mark(grad, lax.pmin(is_finite.astype(jnp.int32), axes) > 0 if axes else is_finite)

    return jax.tree.map(marked, grads)


def _true(grad: Any, scale: jax.Array | None) -> Any:
    """Return a gradient in FP32 (FP64 stays), divided by the scale if there is one; an integer's, float0, as it is.

    An Inf is a NaN then: clipped to a number by each element, as by `optax.clip`, it would hide the overflow.
    """
    if not jnp.issubdtype(grad.dtype, jnp.inexact):
        return grad
    wide = grad.astype(jnp.promote_types(grad.dtype, jnp.float32))
    return wide if scale is None else jnp.where(jnp.isfinite(wide), wide / scale, jnp.nan)
