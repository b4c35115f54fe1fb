"""The end of a run that only skips: which gradients are not finite, or that the loss itself is not.

Where a step is inside of `jit` nothing can be raised, so the state keeps what is to be said, and the host asks for it.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer

from duotone.errors import LossScaleCollapse, LossScaleError, NonFiniteLoss, OptimizerError
from duotone.jax.optim.state import MastersState, state_in
from duotone.jax.scaling.reading import array, loss_scale_of
from duotone.loss_scale import LossScale
from duotone.wording import collapse as words
from duotone.wording.words import first_few

# from 2^32 to the floor it takes 32 skipped steps, and a growth into overflow one; this many is no accident
PATIENCE = 50


def raise_if_collapsed(state: Any, *, patience: int = PATIENCE) -> None:
    """Raise if the last steps were skipped, and there is no hope that later ones will not be.

    That is so where a dynamic loss scale overflowed at its floor twice in a row, and where as many steps as `patience`
    were skipped in a row. Call it on the host, after every step or now and then: it waits for the device.

    Args:
        state: of `duotone.jax.masters`, or anything that holds it, after a step.
        patience: how many steps in a row may be skipped; that many raise.

    Raises:
        LossScaleCollapse: gradients overflow. The message names the parameters whose last gradients were not finite.
        NonFiniteLoss: the last loss was Inf or NaN itself.
        OptimizerError: the master of an FP16 weight went beyond 65504, so that the weight is Inf.
        LossScaleError: the state is traced, or one of several stacked states; or `patience` is no count.
        OptimizerError: there is no state of `masters`, or there are several.

    >>> import optax
    >>> import duotone.jax as dj
    >>> params = {"w": jax.numpy.ones(2)}
    >>> tx = dj.masters(optax.sgd(0.1), "fp16")
    >>> state = tx.init(params)
    >>> dj.raise_if_collapsed(state)
    """
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
        raise LossScaleError(f"patience is {patience!r}; it must be a whole number from 1 on")
    found = state_in(state)
    scale = loss_scale_of(found)
    if isinstance(scale.scale, Tracer):
        raise LossScaleError(
            "raise_if_collapsed reads numbers, but this state is traced; call it outside of jit, or return "
            "report(state) from there and look at that"
        )
    if scale.scale.ndim:
        raise LossScaleError(
            f"this state is {scale.scale.shape[0]} states in one, as vmap and scan stack them; give one of them, "
            "jax.tree.map(lambda leaf: leaf[0], state)"
        )
    skipped, at_floor, is_finite, infinite = jax.device_get(
        (scale.skipped_in_a_row, array(found.overflows_at_floor), array(found.loss_is_finite), array(found.infinite))
    )
    if infinite.any():
        # all that follows comes of it
        raise _infinite_error([path for path, flag in zip(found.paths, infinite, strict=True) if flag])
    if not is_finite:
        if skipped >= patience:
            raise non_finite_loss_error(int(skipped))
    # two in a row: a search for the scale begins there, and one batch alone may be at fault
    elif at_floor > 1 or skipped >= patience:
        raise _collapse_error(found, int(skipped))


def collapse_error(
    names: Sequence[str], parameters: int, skipped: int, scale: float, settings: LossScale
) -> LossScaleCollapse:
    """Return the error of a run whose every step is skipped.

    Args:
        names: paths of the parameters whose last gradients were not finite.
        parameters: how many there are.
        skipped: steps skipped in a row.
        scale: the loss scale of the last of them.
        settings: of the loss scale.

    >>> print(collapse_error(["blocks.0.up.kernel", "blocks.0.down.kernel"], 6, 3, 1.0, LossScale()))
    3 steps in a row were skipped, the last at loss scale 1, its floor: 2 of 6 gradients are not finite
    (blocks.0.up.kernel, blocks.0.down.kernel); keep what overflows in FP32, by keep_float32 or a rule,
    "blocks.0: param=float32,compute=float32", ...
    """
    container = _container(names)
    rule = f', "{container}: param=float32,compute=float32"' if container else ""
    return words.overflow_error(
        skipped=skipped,
        scale=scale,
        settings=settings,
        failed=len(names),
        parameters=parameters,
        shown=first_few(names),
        advice=f"keep what overflows in FP32, by keep_float32 or a rule{rule}",
    )


def _infinite_error(names: Sequence[str]) -> OptimizerError:
    container = _container(names)
    rule = f', "{container or names[0]}: param=float32,compute=float32"'
    return OptimizerError(
        f"weights are Inf ({first_few(names)}), for a step moved their masters beyond FP16's largest 65504; go back to "
        f'a checkpoint, and use policy "bf16", keep them in FP32 by a rule{rule}, or lower the learning rate'
    )


def non_finite_loss_error(skipped: int) -> NonFiniteLoss:
    """Return the error of a run whose loss is not a number."""
    advice = (
        "look at the data and the learning rate, and compute the loss alone in `with jax.debug_nans(True):`, which "
        "names the operation that makes the first NaN"
    )
    return words.non_finite_loss_error(skipped=skipped, loss="the last loss", advice=advice)


def _container(names: Sequence[str]) -> str:
    """Return the path of the innermost part that holds all these parameters; empty if that is the whole model."""
    common = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _collapse_error(state: MastersState, skipped: int) -> LossScaleCollapse:
    flags, scale = jax.device_get((array(state.non_finite), array(state.last_scale)))
    names = [path for path, flag in zip(state.paths, flags, strict=True) if flag]
    return collapse_error(names, len(flags), skipped, float(scale), state.settings)
