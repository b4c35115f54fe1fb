"""The first state of `masters`: tails and the inner optimizer's state, from every bit that the parameters have."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from duotone.errors import OptimizerError
from duotone.jax.loss_scale import initial_state
from duotone.jax.optim.flax_serialization import register_with_flax
from duotone.jax.optim.leaves import check_dtype, is_split, is_trained, widened
from duotone.jax.optim.placing import placed_beside
from duotone.jax.optim.state import MastersState, Paths, states_in
from duotone.jax.optim.surroundings import check_surroundings
from duotone.jax.weights.codec import TAIL_DTYPE, encode
from duotone.jax.weights.plan import SPLIT_DTYPES, Weight, plan
from duotone.loss_scale import LossScale
from duotone.policy import Policy


def start(params: Any, init: Callable[[Any], Any], policy: Policy, settings: LossScale) -> MastersState:
    """Return the state before the first step.

    Raises:
        OptimizerError: the parameters have leaves but no floating-point one, a weight's dtype is not the policy's, or
            the inner optimizer has masters itself.
    """
    # optax.masked and optax.partition show a part of the weights, and rules may be about the others
    planned = plan(params, policy, is_whole=not _is_masked(params))
    leaves, structure = jax.tree.flatten(params)
    trained = [weight.leaf.path for weight, leaf in zip(planned, leaves, strict=True) if is_trained(leaf)]
    if leaves and not trained:
        raise OptimizerError(
            "the parameters hold no floating-point array, so there is nothing to train; give tx.init the pytree of "
            "weights, of an Equinox model eqx.filter(model, eqx.is_inexact_array)"
        )
    for weight, leaf in zip(planned, leaves, strict=True):
        check_dtype(weight.leaf.path, leaf, policy)
    tails = [_tail(weight, leaf) for weight, leaf in zip(planned, leaves, strict=True)]
    check_surroundings(params, [tail is not None for tail in tails])
    wide = structure.unflatten(map(widened, leaves, tails))
    inner = init(wide)
    if states_in(inner):
        raise OptimizerError(
            "masters inside of masters would keep tails of FP32 masters; put one masters around the whole optimizer"
        )
    register_with_flax()
    tails, inner = placed_beside((structure.unflatten(tails), inner), wide)
    return MastersState(
        tails=tails,
        inner=inner,
        loss_scale=initial_state(settings),
        grad_norm=jnp.float32(0),
        found_inf=jnp.bool_(False),
        non_finite=jnp.zeros(len(trained), bool),
        infinite=jnp.zeros(len(trained), bool),
        loss_is_finite=jnp.bool_(True),
        last_scale=jnp.float32(settings.init_scale),
        overflows_at_floor=jnp.int32(0),
        exact_starts=jnp.int32(sum(map(is_split, leaves))),
        settings=settings,
        policy=str(policy),
        paths=Paths(trained),
    )


def _is_masked(tree: Any) -> bool:
    def is_mask(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return any(map(is_mask, jax.tree.leaves(tree, is_leaf=is_mask)))


def _tail(weight: Weight, leaf: Any) -> jax.Array | None:
    if is_split(leaf):
        return jnp.zeros_like(leaf, TAIL_DTYPE)
    if weight.dtype is not None and weight.dtype in SPLIT_DTYPES:
        return encode(jnp.asarray(leaf), weight.dtype)[1]
    return None
