"""Plain functions in Haiku's manner: `init` and `apply` of parameters, state and keys, all of them values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import duotone.jax as dj
from duotone.errors import AutocastError, PolicyError

from .equations import operand_dtypes
from .residuals import residual_dtypes

X = jnp.asarray(np.random.default_rng(0).normal(0.5, 1, (16, 8)), jnp.float32)
Y = jnp.sin(X.sum(-1, keepdims=True))
KEY = jax.random.key(0)


def init(key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
    first, last = jax.random.split(key)
    params = {
        "mlp/~/linear_0": {"w": jax.random.normal(first, (8, 16)) / 3, "b": jnp.zeros(16)},
        "mlp/~/linear_1": {"w": jax.random.normal(last, (16, 1)) / 4, "b": jnp.zeros(1)},
    }
    return params, {"mlp/~/batch_norm": {"mean": jnp.zeros(16), "counter": jnp.zeros((), jnp.int32)}}


def apply(params: Any, state: Any, key: jax.Array, x: jax.Array) -> tuple[jax.Array, Any]:
    layer, last, statistics = params["mlp/~/linear_0"], params["mlp/~/linear_1"], state["mlp/~/batch_norm"]
    with jax.named_scope("linear_0"):
        x = x @ layer["w"] + layer["b"]
    mean = x.mean(0)
    moved = {"mean": 0.9 * statistics["mean"] + 0.1 * mean, "counter": statistics["counter"] + 1}
    x = jax.nn.relu((x - mean) * jax.lax.rsqrt(x.var(0) + 1e-5))
    x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x * 2, 0)
    with jax.named_scope("linear_1"):
        return x @ last["w"] + last["b"], {"mlp/~/batch_norm": moved}


def loss_fn(params: Any, state: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    found, state = apply(params, state, key, x)
    return jnp.square(found - y).mean(), state


def train(loss: Any, steps: int = 3) -> tuple[Any, list[float]]:
    params, state = init(KEY)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> Any:
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, key, X, Y)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state, value

    losses = []
    for number in range(steps):
        params, state, value = step(params, state, jax.random.fold_in(KEY, number))
        losses.append(float(value))
    return state, losses


def loss_alone(params: Any, state: Any, key: jax.Array) -> jax.Array:
    return loss_fn(params, state, key, X, Y)[0]


@functools.cache
def reference() -> tuple[Any, list[float]]:
    return train(loss_fn)


@pytest.mark.parametrize("policy", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_training_moves_state_as_in_float32(policy: str) -> None:
    expected_state, expected = reference()
    state, losses = train(dj.autocast(loss_fn, policy))
    np.testing.assert_allclose(losses, expected, rtol=0.02)
    for found, exact in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        assert found.dtype == exact.dtype
        np.testing.assert_allclose(found, exact, rtol=0.02, atol=5e-3)


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_products_and_what_is_saved_are_16_bit(policy: str) -> None:
    params, state = init(KEY)
    loss = dj.autocast(loss_alone, policy)
    dtype = dj.Policy.parse(policy).compute
    assert set(operand_dtypes(jax.grad(loss), params, state, KEY)) == {dtype}
    # the mean of a batch is a small FP32 vector
    assert dtype in residual_dtypes(loss, params, state, KEY)


def test_a_scope_keeps_its_product_in_float32() -> None:
    loss = dj.autocast(loss_alone, "bf16; linear_1: compute=float32")
    assert operand_dtypes(loss, *init(KEY), KEY) == ["bfloat16", "float32"]


def test_weights_in_16_bits_are_saved_in_16_bits() -> None:
    def f(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ weights[0]) @ weights[1]

    weights = [jnp.ones((8, 64), jnp.bfloat16), jnp.ones((64, 3), jnp.bfloat16)]
    assert residual_dtypes(dj.autocast(f, "bf16"), weights, X) == {"bfloat16"}


def test_autocast_with_the_policy_alone_is_a_decorator() -> None:
    @dj.autocast("bf16,output=bfloat16", argnums=(0, 1))
    def product(weight, other):
        return weight @ other

    assert product(jnp.eye(2), jnp.eye(2)).dtype == jnp.bfloat16
    assert product.__name__ == "product"
    with pytest.raises(AutocastError, match=r'takes a policy, too: autocast\(loss_fn, "bf16"\)'):
        dj.autocast(product)
    with pytest.raises(PolicyError, match="is neither a preset"):
        dj.autocast("bf17")
