"""Arrays of the state of `masters`, wherever it is kept: Flax NNX puts each array into a variable."""

from typing import Any

import jax

from duotone.jax.optim.state import MastersState
from duotone.loss_scale import LossScaleState


def array(field: Any) -> jax.Array:
    """Return the array that a field of the state is, or holds.

    >>> array([jax.numpy.float32(2)])
    Array(2., dtype=float32)
    """
    (leaf,) = jax.tree.leaves(field)
    return leaf


def loss_scale_of(state: MastersState) -> LossScaleState:
    """Return the loss scale of a state, in arrays."""
    return LossScaleState(*jax.tree.leaves(state.loss_scale))
