"""The FP32 masters of 16-bit weights, for evaluation, saving and averaging."""

from typing import Any, TypeVar

import jax.numpy as jnp

from duotone.errors import OptimizerError
from duotone.jax.optim.leaves import is_split, widened
from duotone.jax.optim.state import no_state_error, states_in
from duotone.jax.trees import Leaf, leaves_of, map_leaves

Tree = TypeVar("Tree")


def master_weights(params: Tree, state: Any) -> Tree:
    """Return the parameters with the FP32 master in the place of every 16-bit weight.

    Args:
        params: as they are between steps: the pytree that `tx.update` is given, or a whole model of Equinox or NNX.
        state: the optimizer's state, or whatever holds it: a chain's, an `nnx.Optimizer`'s, a train state.

    Returns:
        A pytree like `params`, of FP32 weights. Leaves that are not 16-bit are as they were.

    Raises:
        OptimizerError: there is no state of `masters`, or it has no tail of a 16-bit weight.

    >>> import optax
    >>> import duotone.jax as dj
    >>> params = {"w": jnp.float32([0.1, 0.2])}
    >>> state = dj.masters(optax.sgd(0.1), "fp16").init(params)
    >>> bool((dj.master_weights(dj.cast(params, "fp16"), state)["w"] == params["w"]).all())
    True
    """
    states = states_in(state)
    if not states:
        raise no_state_error(state)
    # each weight is in one of several states: optax.partition may have given every group an optimizer of its own
    tails = {leaf.path: leaf.value for each in states for leaf in leaves_of(each.tails)}

    def master(leaf: Leaf) -> Any:
        if not is_split(leaf.value):
            return leaf.value
        tail = tails.get(leaf.path)
        if getattr(tail, "shape", None) != jnp.shape(leaf.value):
            raise OptimizerError(
                f'the state of masters has no tail of "{leaf.path}", a weight of shape {jnp.shape(leaf.value)}; give '
                "master_weights the parameters and the state of one optimizer"
            )
        return widened(leaf.value, tail)

    return map_leaves(master, params)
