"""A loss scale on a device: the state of `duotone.loss_scale` as a pytree of typed 0-d arrays.

The transition itself is `duotone.loss_scale.update`, the same for every framework. Here its state crosses `jit`,
`scan`, `vmap` and `shard_map`, and keeps its dtypes where `jax_enable_x64` is on too: FP32 for the scale, int32 for the
rest.
"""

from dataclasses import fields

import jax
import jax.numpy as jnp

from duotone.call_site import warn
from duotone.loss_scale import LossScale, LossScaleState, init_state, update

_LEAVES = [field.name for field in fields(LossScaleState)]
_DTYPES = {"scale": jnp.float32}
# what this process has done: "scaled" a loss, "warned" that none was
_done: set[str] = set()

jax.tree_util.register_dataclass(LossScaleState, data_fields=_LEAVES, meta_fields=[])


def initial_state(settings: LossScale) -> LossScaleState:
    """Return the state before the first step, in 0-d arrays.

    >>> state = initial_state(LossScale())
    >>> state.scale.item(), state.search.dtype
    (65536.0, dtype('int32'))
    """
    numbers = vars(init_state(settings))
    return LossScaleState(**{name: jnp.asarray(numbers[name], _DTYPES.get(name, jnp.int32)) for name in _LEAVES})


def after_step(
    settings: LossScale, state: LossScaleState, found_inf: jax.Array, loss_is_finite: jax.Array | bool = True
) -> LossScaleState:
    """Return the state after one step; nothing waits for the device, and a trace of it has no branch.

    Args:
        settings: how the scale moves.
        state: before the step, as `initial_state` returns it, or an array of such states.
        found_inf: bool, of the leaves' shape: whether the gradients held an Inf or a NaN.
        loss_is_finite: bool, of the same shape: whether the loss was a finite number before it was scaled.

    >>> after_step(LossScale(), initial_state(LossScale()), jnp.bool_(True)).scale.item()
    1.0
    """
    return update(settings, state, found_inf, loss_is_finite=loss_is_finite, where=jnp.where)


def note_scaled_loss() -> None:
    """Remember that a loss was scaled in this process, or that a program was traced which does it."""
    _done.add("scaled")


def warn_if_no_loss_was_scaled() -> None:
    """Warn, once, if gradients come to an optimizer with a loss scale in a process that has scaled no loss.

    Gradients of FP32 weights are FP32 either way, so nothing about them tells.
    """
    if not _done:
        _done.add("warned")
        warn(
            "this optimizer has a loss scale, and no loss was scaled so far: without that, small gradients become 0 in "
            "float16; take gradients with duotone.jax.value_and_grad(loss_fn)(state, params, ...) in the place of "
            "jax.value_and_grad(loss_fn)(params, ...)",
            between=("optax", "flax", "equinox"),
        )
