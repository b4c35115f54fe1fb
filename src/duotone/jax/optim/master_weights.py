"""The FP32 masters of 16-bit weights, for evaluation, saving and averaging."""

from typing import Any

import jax

from duotone.errors import OptimizerError
from duotone.jax.optim.leaves import is_split, widened
from duotone.jax.optim.state import state_in


def master_weights(params: Any, state: Any) -> Any:
    """Return the parameters with the FP32 master in the place of every 16-bit weight.

    Args:
        params: as they are between steps.
        state: the optimizer's state; whatever holds one state of `masters` will do: a chain's, an `nnx.Optimizer`'s.

    Returns:
        A pytree like `params`. Leaves that are not 16-bit are the same objects. Under `jit` the masters are new
        arrays of 4 bytes each.

    Raises:
        OptimizerError: there is no such state, several, or one of other parameters.

    >>> import jax.numpy as jnp, optax
    >>> import duotone.jax as dj
    >>> params = {"w": jnp.float32([0.1, 0.2])}
    >>> state = dj.masters(optax.sgd(0.1), "fp16").init(params)
    >>> bool((dj.master_weights(dj.cast(params, "fp16"), state)["w"] == params["w"]).all())
    True
    """
    leaves, structure = jax.tree.flatten(params)
    try:
        tails = structure.flatten_up_to(state_in(state).tails)
    except ValueError as error:
        raise OptimizerError(
            "the state is of parameters of another structure; give master_weights the parameters that the last "
            "tx.update was given, with its updates added"
        ) from error
    # a variable of NNX may stand around a tail
    tails = [next(iter(jax.tree.leaves(tail)), None) for tail in tails]
    wide = [widened(leaf, tail) if is_split(leaf) else leaf for leaf, tail in zip(leaves, tails, strict=True)]
    return structure.unflatten(wide)
