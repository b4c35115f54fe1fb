"""`masters`: the start from every bit, what the inner optimizer sees, skips, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import duotone.jax as dj
from duotone.errors import OptimizerError
from duotone.jax.optim.state import MastersState

POLICIES = ("bf16", "fp16")


def parameters() -> dict:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "dense": {"kernel": jax.random.normal(keys[0], (5, 7)), "bias": jax.random.normal(keys[1], 7) * 1e-4},
        "LayerNorm_0": {"scale": 1 + jax.random.normal(keys[2], 7) / 8},
        "steps": jnp.int32(3),
        "absent": None,
    }


def gradients(params: dict, seed: int, dtype: str | None = None) -> dict:
    def one(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        draw = jax.random.normal(jax.random.fold_in(jax.random.key(seed), leaf.size), leaf.shape)
        return draw.astype(dtype or leaf.dtype)

    return jax.tree.map(one, params)


def assert_same_bits(one: object, other: object) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("policy", POLICIES)
def test_masters_right_after_the_start_are_the_float32_parameters(policy: str) -> None:
    params = parameters()
    state = dj.masters(optax.adam(1e-3), policy).init(params)
    cast = dj.cast(params, policy)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(cast["dense"])} == {dj.Policy.parse(policy).param}
    assert cast["LayerNorm_0"]["scale"].dtype == jnp.float32
    assert_same_bits(dj.master_weights(cast, state), params)
    assert int(state.exact_starts) == 0


def test_parameters_that_are_16_bit_already_are_exact_and_the_state_says_so() -> None:
    cast = dj.cast(parameters(), "bf16")
    state = dj.masters(optax.adam(1e-3), "bf16").init(cast)
    assert int(state.exact_starts) == 2
    wide = dj.master_weights(cast, state)
    assert_same_bits(wide["dense"], jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cast["dense"]))


def test_the_inner_optimizer_sees_float32() -> None:
    seen = []

    def update(grads: dict, state: tuple, params: dict | None = None) -> tuple:
        seen.extend(jax.tree.leaves((grads, params)))
        return grads, state

    params = parameters()
    tx = dj.masters(
        optax.GradientTransformation(lambda params: seen.extend(jax.tree.leaves(params)) or (), update), "bf16"
    )
    state = tx.init(params)
    cast = dj.cast(params, "bf16")
    tx.update(gradients(cast, 0), state, cast)
    assert len(seen) == 9
    assert {leaf.dtype for leaf in seen} == {jnp.dtype("float32")}
    # at the start, the parameters themselves; in the step their masters, which are the same
    assert_same_bits(seen[:3], seen[6:])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_skipped_step_changes_nothing_but_the_loss_scale(policy: str) -> None:
    params = parameters()
    tx = dj.masters(optax.adamw(optax.linear_schedule(1e-2, 0, 10)), policy)
    state = tx.init(params)
    params = dj.cast(params, policy)
    updates, state = tx.update(gradients(params, 0, "float32" if policy == "fp16" else None), state, params)
    params = optax.apply_updates(params, updates)
    bad = gradients(params, 1, "float32" if policy == "fp16" else None)
    bad["dense"]["bias"] = bad["dense"]["bias"].at[3].set(jnp.inf)
    updates, after = tx.update(bad, state, params)
    assert_same_bits(optax.apply_updates(params, updates), params)
    assert_same_bits((after.tails, after.inner), (state.tails, state.inner))
    assert bool(after.found_inf)
    assert [path for path, bad in zip(after.paths, after.non_finite, strict=True) if bad] == ["dense.bias"]
    assert int(after.loss_scale.skipped) == 1
    assert float(after.loss_scale.scale) == (1 if policy == "bf16" else 2**15)


def test_arguments_may_be_given_by_the_names_that_optax_has() -> None:
    params = {"w": jnp.ones(2)}
    tx = dj.masters(optax.sgd(0.5), "bf16")
    updates, _ = tx.update(updates=params, state=tx.init(params=params), params=dj.cast(params, "bf16"))
    assert (jnp.ones(2, jnp.bfloat16) + updates["w"]).tolist() == [0.5, 0.5]


def test_the_state_is_a_pytree_of_arrays_with_key_paths() -> None:
    state = dj.masters(optax.adam(1e-3), "fp16").init(parameters())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert ".tails['dense']['kernel']" in paths
    assert ".loss_scale.scale" in paths
    assert isinstance(jax.tree.map(lambda leaf: leaf, state), MastersState)
    types = {(leaf.dtype.name, leaf.weak_type) for leaf in jax.tree.leaves(jax.jit(lambda s: s)(state.loss_scale))}
    assert types == {("float32", False), ("int32", False)}


def test_float64_of_numpy_is_fp32_where_jax_has_no_fp64() -> None:
    params = {"w": np.linspace(0, 1, 6).reshape(2, 3), "LayerNorm_0": {"scale": np.ones(3)}}
    tx = dj.masters(optax.sgd(0.5), "bf16")
    state, narrow = tx.init(params), dj.cast(params, "bf16")
    assert narrow["w"].dtype == jnp.bfloat16
    assert narrow["LayerNorm_0"]["scale"].dtype == jnp.float32
    masters = dj.master_weights(narrow, state)
    assert (masters["w"] == params["w"].astype(np.float32)).all()
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, masters), state, narrow)
    assert optax.apply_updates(narrow, updates)["w"].dtype == jnp.bfloat16


def test_of_two_states_one_is_asked_for() -> None:
    state = dj.masters(optax.sgd(0.5), "bf16").init({"w": jnp.ones(2)})
    with pytest.raises(OptimizerError, match=r"2 states .* in this dict; .* such as state\['generator'\]"):
        dj.report({"generator": state, "discriminator": state})
