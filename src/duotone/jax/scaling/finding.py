"""The state of `masters` inside of any optimizer's state: a chain's tuple, a TrainState, an `nnx.Optimizer`."""

from typing import Any

import jax

from duotone.errors import LossScaleError
from duotone.loss_scale import LossScaleState


def masters_state(state: Any, verb: str) -> Any:
    """Return the one state of `masters` in a pytree, in arrays.

    Args:
        state: what `tx.init` returned, or anything that holds it.
        verb: who asks, for the message.

    Raises:
        LossScaleError: there is none, or more than one.
    """
    found = [node for node in jax.tree.leaves(state, is_leaf=_is_masters_state) if _is_masters_state(node)]
    if not found:
        raise LossScaleError(
            f"{verb} needs the optimizer's state, that of duotone.jax.masters, and there is none in this "
            f"{type(state).__name__}; write tx = masters(optax.adamw(1e-3), policy), state = tx.init(params), and give "
            "it that state first"
        )
    if len(found) > 1:
        raise LossScaleError(
            f"{verb} found {len(found)} states of duotone.jax.masters in this {type(state).__name__}, each with a loss "
            "scale of its own; put masters around all of them, masters(optax.partition(...), policy)"
        )
    return found[0]


def arrays(state: LossScaleState) -> LossScaleState:
    """Return a loss scale's state in arrays: Flax NNX puts each into a variable."""
    return LossScaleState(*jax.tree.leaves(state))


def _is_masters_state(node: Any) -> bool:
    return isinstance(getattr(node, "loss_scale", None), LossScaleState)
