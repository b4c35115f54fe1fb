"""Where the bytes of a training state are, by role: what `memory` counts. It adds up arrays, or their shapes."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from duotone.jax.optim.leaves import is_trained
from duotone.jax.optim.state import states_in
from duotone.jax.trees import Leaf, is_nnx_param, leaves_of
from duotone.jax.weights.codec import TAIL_DTYPE
from duotone.policy import Policy
from duotone.wording.memory import Memory


def memory(params: Any, state: Any = None, *, device: Any = None) -> Memory:
    """Count the bytes of weights, tails, gradients and optimizer state; exact, since it adds up arrays.

    Without a device an array counts once, however many devices hold it or parts of it. With one, whatever that device
    holds counts: its shards, and its copies of what is replicated. Nothing is computed, so arrays may be
    `jax.ShapeDtypeStruct`, with or without a sharding.

    Gradients are counted as they are between the backward pass and the update: one for each weight, in its dtype, or in
    FP32 if the policy of `masters` says `grad=float32`. The FP32 gradients of a scaled loss are 16-bit in memory where
    gradients and update stand in one `jax.jit`.

    Args:
        params: parameters in any pytree or module. Integers, PRNG keys, statistics of NNX modules and of Linen's
            collections are no weights, and count as other.
        state: the optimizer's state, or whatever holds one: of `masters`, or of any Optax optimizer.
        device: one of `jax.devices()`, to count what it holds.

    Returns:
        A `Memory`, which shows itself as a line, and in a notebook as a table.

    >>> import jax.numpy as jnp, optax, duotone.jax as dj
    >>> tx = dj.masters(optax.adamw(1e-3), "bf16")
    >>> params = {"kernel": jnp.ones((8, 8))}
    >>> state = tx.init(params)
    >>> dj.memory(dj.cast(params, "bf16"), state).bytes_per_parameter
    14.0
    """
    shares = {id(leaf.value): _Share.of(leaf.value, device) for leaf in leaves_of((params, state)) if _is_array(leaf)}
    weights = {leaf.path: leaf.value for leaf in leaves_of(params) if _is_weight(leaf)}
    is_wide = any(Policy.parse(each.policy).grad == "float32" for each in states_in(state))
    counted = Counter[str]()
    elements, seen = 0, set[int]()
    for leaf in leaves_of(params):
        if id(leaf.value) in shares and id(leaf.value) not in seen:
            seen.add(id(leaf.value))
            share = shares[id(leaf.value)]
            counted["weights" if _is_weight(leaf) else "other"] += share.bytes
            if _is_weight(leaf):
                elements += share.elements
                counted["gradients"] += 4 * share.elements if is_wide else share.bytes
    for leaf in leaves_of(state):
        if id(leaf.value) in shares and id(leaf.value) not in seen:
            seen.add(id(leaf.value))
            counted[_role(leaf, weights)] += shares[id(leaf.value)].bytes
    roles = ("weights", "tails", "gradients", "moments", "other")
    return Memory(elements, **{f"{role}_bytes": counted[role] for role in roles})


class _Share(NamedTuple):
    """What of an array counts."""

    elements: int
    bytes: int

    @classmethod
    def of(cls, array: Any, device: Any) -> "_Share":
        shape = array.shape
        if device is not None:
            sharding = getattr(array, "sharding", None)
            if sharding is None or device not in sharding.device_set:
                return cls(0, 0)
            shape = sharding.shard_shape(shape)
        elements = math.prod(shape)
        return cls(elements, elements * array.dtype.itemsize)


def _is_array(leaf: Leaf) -> bool:
    return hasattr(leaf.value, "dtype") and hasattr(leaf.value, "shape")


def _is_weight(leaf: Leaf) -> bool:
    """Return whether a leaf of the parameters is trained."""
    is_param = leaf.variable is None or is_nnx_param(leaf.variable)
    return is_param and leaf.collection in (None, "params") and _is_array(leaf) and is_trained(leaf.value)


def _role(leaf: Leaf, weights: Mapping[str, Any]) -> str:
    """Return what an array of an optimizer's state is for: one beside a weight, at the end of whose path it stands."""
    names = leaf.path.split(".")
    for start in range(len(names) + 1):
        weight = weights.get(".".join(names[start:]))
        if weight is not None and "tails" in names[:start] and leaf.value.dtype == TAIL_DTYPE:
            return "tails"
        # a factor of a moment has fewer elements than its weight
        if weight is not None and leaf.value.ndim and (start < len(names) or leaf.value.shape == weight.shape):
            return "moments"
    return "other"
