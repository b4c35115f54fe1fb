"""Long runs: overflows at every position, small updates in BF16, weights that are edited between steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import duotone.jax as dj


def loss_of(params: dict, x: jax.Array, boost: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x.astype(params["w"].dtype) @ params["w"])
    return boost * jnp.mean(jnp.square(hidden.astype(jnp.float32) @ params["head"].astype(jnp.float32) - 0.5))


def parameters() -> dict:
    keys = jax.random.split(jax.random.key(0), 2)
    return {"w": jax.random.normal(keys[0], (4, 3)) / 2, "head": jax.random.normal(keys[1], (3,))}


@pytest.mark.parametrize("steps", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_fp16_with_an_overflow_at_every_position(steps: int) -> None:
    inner = optax.adamw(optax.cosine_decay_schedule(1e-2, steps))
    tx = dj.masters(inner, "fp16")
    inputs = jax.random.normal(jax.random.key(2), (steps, 2, 4))

    def run(position: jax.Array) -> tuple:
        """Train with an overflow in one step, in FP16 with masters and in FP32 on the same gradients."""

        def step(carry: tuple, each: tuple) -> tuple[tuple, None]:
            params, state, wide, inner_state = carry
            index, x = each
            boost = jnp.where(index == position, 1e30, 1.0)
            _, grads = dj.value_and_grad(loss_of)(state, params, x, boost)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            own, moved = inner.update(grads, inner_state, wide)
            chosen = jax.tree.map(
                lambda old, new: jnp.where(state.found_inf, old, new),
                (wide, inner_state),
                (optax.apply_updates(wide, own), moved),
            )
            return (params, state, *chosen), None

        start = parameters()
        carry = (dj.cast(start, "fp16"), tx.init(start), start, inner.init(start))
        (params, state, wide, inner_state), _ = jax.lax.scan(step, carry, (jnp.arange(steps), inputs))
        # from 2 on two neighbours in FP32 lie 2.4e-7 apart
        apart = jax.tree.map(
            lambda one, other: (jnp.abs(one - other) / jnp.maximum(jnp.abs(other), 1)).max(),
            dj.master_weights(params, state),
            wide,
        )
        return apart, state.loss_scale.skipped, state.inner[0].count, inner_state[0].count

    difference, skipped, count, count_in_float32 = jax.jit(jax.vmap(run))(jnp.arange(steps))
    # the first scale may overflow too
    assert int(skipped.min()) >= 1
    assert (count == steps - skipped).all()
    assert (count == count_in_float32).all()
    # XLA on CPUs contracts multiply-adds in one program and not in the other: one unit in the last place
    assert max(float(leaf.max()) for leaf in jax.tree.leaves(difference)) <= 2.0**-23


def test_a_rate_at_which_plain_bf16_stands_still_trains_as_float32() -> None:
    inner = optax.sgd(2.0**-12)
    start = {"w": jnp.float32([1.0, -1.5, 1.75])}
    grads = {"w": jnp.float32([1.0, -1.0, 1.0])}

    def train(tx: optax.GradientTransformation, params: dict, state: object) -> tuple[dict, object]:
        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            params, state = carry
            own = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, params)
            updates, state = tx.update(own, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, length=400)[0]

    cast = dj.cast(start, "bf16")
    assert np.array_equal(train(inner, cast, inner.init(cast))[0]["w"], cast["w"])
    tx = dj.masters(inner, "bf16")
    reference, _ = train(inner, start, inner.init(start))
    masters = dj.master_weights(*train(tx, cast, tx.init(start)))
    assert np.array_equal(masters["w"], reference["w"])
    assert float(reference["w"][0]) == 1 - 400 * 2.0**-12


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_the_step_goes_on_from_weights_that_were_edited(policy: str) -> None:
    start = {"w": jnp.float32([1.001, 0.5004, -2.003, 3.0, 7.001, -0.1])}
    tx = dj.masters(optax.sgd(0.125), policy)
    state, params = tx.init(start), dj.cast(start, policy)
    # a zero whose tail is that of a weight that was rounded up, an Inf and a NaN among them
    edited = {"w": jnp.asarray([0.0, -0.0, 5.0, jnp.inf, jnp.nan, -0.125], params["w"].dtype)}
    for tail in (0, 1, -1, 0x7FFF, -0x8000):
        tails = jax.tree.map(lambda leaf, tail=tail: jnp.full_like(leaf, tail), state.tails)
        wide = dj.master_weights(edited, type(state)(**{**vars(state), "tails": tails}))["w"]
        own = edited["w"].astype(jnp.float32)
        assert np.array_equal(jnp.isnan(wide), jnp.isnan(own))
        np.testing.assert_allclose(wide[jnp.isfinite(own)], own[jnp.isfinite(own)], rtol=2.0**-8, atol=2.0**-24)
    edited = {"w": jnp.asarray([0.25, -0.0, 5.0, 1.0, 2.0, -0.125], params["w"].dtype)}
    updates, state = tx.update({"w": jnp.ones(6, jnp.float32)}, state, edited)
    after = dj.master_weights(optax.apply_updates(edited, updates), state)["w"]
    np.testing.assert_allclose(after, edited["w"].astype(jnp.float32) - 0.125, rtol=2.0**-8, atol=2.0**-24)
