"""Equinox modules under autocast: functions in fields, statistics in eqx.nn.State, filtered transforms around."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import duotone.jax as dj

from .equations import operand_dtypes

eqx = pytest.importorskip("equinox")

X = jnp.asarray(np.random.default_rng(0).normal(0.5, 1, (16, 8)), jnp.float32)
Y = jnp.sin(X.sum(-1, keepdims=True))
KEY = jax.random.key(0)


class Model(eqx.Module):
    """A product, BatchNorm and dropout, then a product; an activation and a name that are no arrays."""

    first: Any
    norm: Any
    dropout: Any
    last: Any
    activation: Any
    name: str = eqx.field(static=True)

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(8, 16, key=keys[0])
        self.norm = eqx.nn.BatchNorm(16, axis_name="batch", mode="ema")
        self.dropout = eqx.nn.Dropout(0.5)
        self.last = eqx.nn.Linear(16, 1, key=keys[1])
        self.activation = jax.nn.relu
        self.name = "model"

    def __call__(self, x: jax.Array, state: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        x, state = self.norm(self.first(x), state)
        return self.last(self.dropout(self.activation(x), key=key)), state


@functools.cache
def model() -> tuple[Any, Any]:
    return eqx.nn.make_with_state(Model)(KEY)


def loss_fn(model: Any, state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
    keys = jax.random.split(key, len(x))
    found, state = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(x, state, keys)
    return jnp.square(found - y).mean(), state


def train(loss: Any, steps: int = 3) -> tuple[Any, Any, list[float]]:
    trained, state = model()

    @eqx.filter_jit
    def step(model: Any, state: Any, key: jax.Array) -> Any:
        (value, state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, state, X, Y, key)
        updates = jax.tree.map(lambda grad: -0.1 * grad, grads)
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for number in range(steps):
        trained, state, value = step(trained, state, jax.random.fold_in(KEY, number))
        losses.append(float(value))
    return trained, state, losses


@functools.cache
def reference() -> tuple[Any, Any, list[float]]:
    return train(loss_fn)


@pytest.mark.parametrize("policy", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_training_moves_statistics_as_in_float32(policy: str) -> None:
    _, expected_state, expected = reference()
    trained, state, losses = train(dj.autocast(loss_fn, policy))
    np.testing.assert_allclose(losses, expected, rtol=0.02)
    before = jax.tree.leaves(model()[1])
    for found, exact, first in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), before, strict=True):
        assert found.dtype == exact.dtype
        np.testing.assert_allclose(found, exact, rtol=0.02, atol=5e-3)
        assert not np.array_equal(found, first)
    assert trained.activation is jax.nn.relu
    assert trained.first.weight.dtype == jnp.float32


def test_products_are_16_bit_and_functions_stay() -> None:
    trained, state = model()
    inference = eqx.nn.inference_mode(trained)

    @functools.partial(dj.autocast, policy="bf16")
    def call(model: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        return model, jax.vmap(lambda x: model(x, state, KEY)[0], axis_name="batch")(x)

    same, found = eqx.filter_jit(call)(inference, X)
    assert (same.activation, same.name, found.shape) == (jax.nn.relu, "model", (16, 1))
    arrays, rest = eqx.partition(inference, eqx.is_array)
    assert set(operand_dtypes(lambda arrays, x: call(eqx.combine(arrays, rest), x)[1], arrays, X)) == {"bfloat16"}


def test_rules_by_the_scopes_of_equinox() -> None:
    trained, state = model()
    arrays, rest = eqx.partition(eqx.nn.inference_mode(trained), eqx.is_array)

    def call(arrays: Any, x: jax.Array) -> jax.Array:
        with jax.named_scope("model"):
            return jax.vmap(lambda x: eqx.combine(arrays, rest)(x, state, KEY)[0], axis_name="batch")(x)

    kept = dj.autocast(call, "bf16; eqx.nn.Linear: compute=float32")
    assert set(operand_dtypes(kept, arrays, X)) == {"float32"}


def test_a_module_itself_is_a_function() -> None:
    linear = eqx.nn.Linear(8, 4, key=KEY)
    np.testing.assert_allclose(dj.autocast(linear, "bf16", argnums=())(X[0]), linear(X[0]), rtol=0.05, atol=0.02)


def test_filtered_transforms_inside() -> None:
    trained, state = model()
    inference = eqx.nn.inference_mode(trained)

    def penalty(model: Any, x: jax.Array) -> jax.Array:
        inner = eqx.filter_grad(lambda model: jnp.square(model(x, state, KEY)[0]).sum())(model)
        squares = [jnp.square(leaf).sum() for leaf in jax.tree.leaves(eqx.filter(inner, eqx.is_array))]
        return jnp.stack(squares).sum()

    def whole(model: Any, x: jax.Array) -> jax.Array:
        return eqx.filter_vmap(penalty, in_axes=(None, 0), axis_name="batch")(model, x).sum()

    value, expected = (eqx.filter_jit(f)(inference, X[:3]) for f in (dj.autocast(whole, "bf16"), whole))
    np.testing.assert_allclose(value, expected, rtol=0.05)
