"""Updates of 16-bit weights: added without rounding, crossing `jit`, and good for nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from duotone.errors import OptimizerError
from duotone.jax.optim.exact_update import OpaqueUpdate, exact_update

DTYPES = ("bfloat16", "float16")


def weights(dtype: str, seed: int) -> jax.Array:
    """Return every 16-bit pattern that is no NaN, in some order."""
    patterns = np.random.default_rng(seed).permutation(2**16).astype(np.uint16)
    numbers = jax.lax.bitcast_convert_type(jnp.asarray(patterns), dtype)
    return jnp.where(jnp.isnan(numbers), 0, numbers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_weight_becomes_any_other_bit_for_bit(dtype: str) -> None:
    old, new = weights(dtype, 0), weights(dtype, 1)
    for function in (lambda old, new: old + exact_update(new), lambda old, new: exact_update(new) + old):
        added = jax.jit(function)(old, new)
        assert added.dtype == dtype
        assert np.asarray(added).tobytes() == np.asarray(new).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_makes_no_nan_where_there_is_none(dtype: str) -> None:
    with jax.debug_nans(True):
        assert (jnp.ones(2, dtype) + exact_update(jnp.zeros(2, dtype)) == 0).all()


def test_it_crosses_jit_cond_and_scan_and_zeros_change_nothing() -> None:
    old, new = jnp.bfloat16([1, -0.0, 3]), jnp.bfloat16([1.0078125, 2, -3])
    update = jax.jit(exact_update)(new)
    assert (old + update == new).all()
    update = jax.lax.cond(True, lambda update: update, optax.tree.zeros_like, update)
    assert (np.asarray(old) + update == new).all()
    assert (old + optax.tree.zeros_like(update) == old).all()
    _, updates = jax.lax.scan(lambda carry, _: (carry, exact_update(new)), None, length=2)
    assert (jnp.stack([old, old]) + updates == jnp.stack([new, new])).all()


@pytest.mark.parametrize(
    "use",
    [
        lambda update: 0.5 * update,
        lambda update: -update,
        lambda update: update / 2,
        lambda update: update + update,
        lambda update: jnp.ones(2) - update,
        abs,
        np.asarray,
        float,
        lambda update: jax.tree.map(lambda part: 0.5 * part, update),
        lambda update: jax.tree.map(jnp.negative, update),
        lambda update: optax.tree.add(update, update) and jnp.ones(2, jnp.bfloat16) + optax.tree.add(update, update),
        optax.tree.norm,
        lambda update: jnp.ones(2) + update,
        lambda update: jnp.ones(3, jnp.bfloat16) + update,
        lambda update: jnp.ones(2, jnp.float16) + update,
    ],
)
@pytest.mark.parametrize("kind", [None, OpaqueUpdate])
def test_every_other_use_is_an_error(use, kind) -> None:
    old = jnp.ones(2, jnp.bfloat16)
    update = exact_update(2 * old, **({} if kind is None else {"kind": kind}))
    with pytest.raises((OptimizerError, TypeError, ValueError)) as caught:
        use(update)
    # JAX names the class where it refuses an opaque leaf, and the dtype where it refuses a part of the other kind
    assert isinstance(caught.value, OptimizerError) or ("bool" if kind is None else "OpaqueUpdate") in str(caught.value)
