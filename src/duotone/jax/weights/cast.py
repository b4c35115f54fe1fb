"""Casts parameters into a policy: the weights of any pytree, rounded as the tails of `masters` need it."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from duotone.errors import PolicyError
from duotone.jax.policies import read
from duotone.jax.trees import Leaf, map_leaves
from duotone.jax.weights.codec import encode
from duotone.jax.weights.plan import SPLIT_DTYPES, plan
from duotone.policy import Policy

Tree = TypeVar("Tree")
# one program for each shape, in place of one for each operation
_encode = jax.jit(encode, static_argnums=1)
_LARGEST_FLOAT16 = 65504.0


def cast(params: Tree, policy: Policy | str) -> Tree:
    """Return parameters with every weight in the policy's `param` dtype.

    FP32, BF16 and FP16 leaves are weights, but those of norms stay FP32, and so do class tokens and position embeddings
    where the policy's `residual` is float32; a rule that names them goes before that. Integers, complex numbers,
    FP64, Python numbers, the collections of Linen beside `params` and the variables of NNX that are no `Param`
    are left alone. BF16 is rounded to nearest, ties away from zero, FP16 to nearest even: what `masters` keeps is what
    this rounding takes away, so call `tx.init` with the parameters as they were before the cast.

    Args:
        params: any pytree: dicts of Linen or Haiku, a model of Equinox, a module or state of NNX.
        policy: a `Policy` or its text. The patterns of rules are over key paths, `"bf16; head.*: param=float32"`,
            and, after `type=`, over names of classes where containers have one.

    Returns:
        A new pytree; the old one is as it was.

    Raises:
        PolicyError: the policy cannot be read, JAX cannot have it, there is no weight, a rule that sets `param`
            holds for none, or a weight is too large for FP16.

    >>> params = cast({"dense": {"kernel": jnp.ones((2, 2))}, "LayerNorm_0": {"scale": jnp.ones(2)}}, "bf16")
    >>> params["dense"]["kernel"].dtype, params["LayerNorm_0"]["scale"].dtype
    (dtype(bfloat16), dtype('float32'))
    """
    planned = plan(params, read(policy))
    if not any(weight.dtype is not None for weight in planned):
        raise PolicyError(
            f"there is no float32, bfloat16 or float16 array to cast in this {type(params).__name__}; give cast the "
            "pytree of weights"
        )
    dtypes = {weight.leaf.path: weight.dtype for weight in planned}
    return map_leaves(lambda leaf: _cast(leaf, dtypes.get(leaf.path)), params)


def _cast(leaf: Leaf, dtype: Any) -> Any:
    weight = leaf.value
    if dtype is None or weight.dtype == dtype:
        return weight
    if dtype not in SPLIT_DTYPES:
        return jnp.asarray(weight).astype(dtype)
    wide = jnp.asarray(weight).astype(jnp.float32)
    if dtype == jnp.float16 and not isinstance(wide, Tracer):
        largest = float(jnp.max(jnp.where(jnp.isfinite(wide), jnp.abs(wide), 0), initial=0))
        # what rounds to Inf
        if largest >= _LARGEST_FLOAT16 + 16:
            raise PolicyError(
                f'parameter "{leaf.path}" holds {largest:.6g}, beyond FP16\'s largest 65504; use policy "bf16", or '
                f'keep it in FP32 by a rule: "{leaf.path}: param=float32,compute=float32"'
            )
    return _encode(wide, dtype)[0]
