"""Whole runs under a loss scale: whatever the scale does, masters are what they are without it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import duotone.jax as dj
from duotone.errors import DuotoneWarning

STEPS = 12
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"w": jax.random.normal(KEYS[0], (8, 4)), "b": jnp.zeros(4)}
XS = jax.random.normal(KEYS[1], (STEPS, 16, 8))
YS = jax.random.normal(KEYS[2], (STEPS, 16, 4))


def loss_of(params, batch):
    x, y, factor = batch
    error = (x.astype(params["w"].dtype) @ params["w"]).astype(jnp.float32) + params["b"] - y
    return jnp.square(error).mean() * factor


def run(settings, factors):
    """Return the masters after a run, and the reports of its steps.

    Args:
        settings: of the loss scale.
        factors: of the loss of each step; None for a batch that is left out.
    """
    tx = dj.masters(optax.adam(1e-2), "fp16", loss_scale=settings, clip_norm=0.5)

    def step(carry, batch):
        params, state = carry
        _, grads = dj.value_and_grad(loss_of)(state, params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), dj.report(state)

    given = [number for number, factor in enumerate(factors) if factor is not None]
    batches = XS[np.array(given)], YS[np.array(given)], jnp.float32([factors[number] for number in given])
    carry = dj.cast(PARAMS, "fp16"), tx.init(PARAMS)
    (params, state), reports = jax.jit(lambda: lax.scan(step, carry, batches))()
    return dj.master_weights(params, state), reports


def check_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_scale_that_grows_after_every_step_changes_no_bit():
    # where gradients are divided by the scale of the next step, each is halved
    grown, reports = run(dj.LossScale(2.0**2, growth_interval=1), [1.0] * STEPS)
    assert reports.loss_scale.tolist() == [2.0 ** (2 + n) for n in range(STEPS)]
    assert not reports.skipped.any()
    still, of_still = run(dj.LossScale.static(2.0**8), [1.0] * STEPS)
    check_equal((grown, reports.grad_norm), (still, of_still.grad_norm))


@pytest.mark.parametrize("odd", [{0, 1}, {5, 11}])
def test_steps_that_overflow_leave_all_as_if_their_batches_had_not_been(odd):
    settings = dj.LossScale.static(2.0**8)
    found, reports = run(settings, [1e6 if n in odd else 1.0 for n in range(STEPS)])
    assert set(np.flatnonzero(reports.skipped)) == odd
    check_equal(found, run(settings, [None if n in odd else 1.0 for n in range(STEPS)])[0])


def test_losses_that_are_not_finite_leave_all_and_the_scale():
    settings = dj.LossScale(2.0**8)
    found, reports = run(settings, [np.inf if n in {3, 4} else 1.0 for n in range(STEPS)])
    assert set(np.flatnonzero(reports.skipped)) == {3, 4}
    assert set(reports.loss_scale.tolist()) == {2.0**8}
    check_equal(found, run(settings, [None if n in {3, 4} else 1.0 for n in range(STEPS)])[0])


def test_where_no_loss_was_scaled_it_is_said_once(monkeypatch):
    monkeypatch.setattr("duotone.jax.loss_scale._done", set())
    tx = dj.masters(optax.sgd(0.1), "fp16-mixed")
    state, grads = tx.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    with pytest.warns(DuotoneWarning, match="no loss was scaled so far: .* take gradients with duotone.jax.value"):
        tx.update(grads, state, PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.update(grads, state, PARAMS)
        # nor is it said to those who scale, or need not
        monkeypatch.setattr("duotone.jax.loss_scale._done", set())
        dj.value_and_grad(lambda params: params["b"].sum())(state, PARAMS)
        tx.update(grads, state, PARAMS)
        monkeypatch.setattr("duotone.jax.loss_scale._done", set())
        tx = dj.masters(optax.sgd(0.1), "bf16-mixed")
        tx.update(grads, tx.init(PARAMS), PARAMS)
