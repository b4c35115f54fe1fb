"""Gradients through casts and through steps of `masters`: those of FP32 training, not 0."""

import jax
import jax.numpy as jnp
import optax
import pytest

import duotone.jax as dj
from duotone.jax.optim import pieces

PARAMS = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.ones(3)}
X = jnp.linspace(0, 1, 8).reshape(2, 4)


def loss(params, x):
    return jnp.sum(jnp.square(x @ params["w"] + params["b"])).astype(jnp.float32)


def loss_after_a_step(learning_rate, first_bias, policy):
    tx = dj.masters(optax.sgd(learning_rate, momentum=0.9), policy)
    params = {**PARAMS, "b": PARAMS["b"] + first_bias}
    state = tx.init(params)
    params = dj.cast(params, policy)
    updates, state = tx.update(jax.grad(loss)(params, X), state, params)
    return loss(optax.apply_updates(params, updates), X)


@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1"])
def test_a_cast_has_the_derivative_of_a_rounding(policy):
    found = jax.grad(lambda params: loss(dj.cast(params, policy), X))(PARAMS)
    expected = jax.grad(loss)(PARAMS, X)
    for name in PARAMS:
        assert found[name].dtype == jnp.float32
        assert jnp.allclose(found[name], expected[name], rtol=0.02)


@pytest.mark.parametrize("argnum", [0, 1])
@pytest.mark.parametrize("way", ["eager", "jit", "pieces"])
def test_a_step_has_the_derivative_of_float32_training(argnum, way, monkeypatch):
    if way == "pieces":
        monkeypatch.setattr(pieces, "are_possible", lambda: True)
        monkeypatch.setattr(pieces, "_SMALLEST_PIECE", 2)
    transform = (lambda function: function) if way == "eager" else jax.jit
    gradients = [
        jax.grad(transform(lambda rate, bias, policy=policy: loss_after_a_step(rate, bias, policy)), argnum)(0.1, 0.0)
        for policy in ("fp32", "bf16")
    ]
    assert gradients[0] != 0
    assert gradients[1] == pytest.approx(float(gradients[0]), rel=0.02)
