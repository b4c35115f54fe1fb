"""Flax Linen under autocast: variables as values, statistics in FP32, the same random bits, rules by module paths."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import duotone.jax as dj
from duotone.errors import AutocastError

from .equations import equations, operand_dtypes

nn = pytest.importorskip("flax.linen")

X = jnp.asarray(np.random.default_rng(0).normal(0.5, 1, (16, 8)), jnp.float32)
Y = jnp.sin(X.sum(-1, keepdims=True))
KEY = jax.random.key(0)


class Model(nn.Module):
    """A product, BatchNorm and dropout, then a product."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = nn.Dense(16)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(1)(x)


MODEL = Model()


@functools.cache
def variables() -> dict[str, Any]:
    return MODEL.init({"params": KEY, "dropout": KEY}, X)


def loss_fn(params: Any, state: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    found, changed = MODEL.apply(
        {"params": params, "batch_stats": state}, x, mutable=["batch_stats"], rngs={"dropout": key}
    )
    return jnp.square(found - y).mean(), changed["batch_stats"]


def train(loss: Any, steps: int = 3) -> tuple[Any, Any, list[float]]:
    params, state = variables()["params"], variables()["batch_stats"]
    tx = optax.sgd(0.1)
    opt_state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, opt_state: Any, key: jax.Array) -> Any:
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, key, X, Y)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), state, opt_state, value

    losses = []
    for number in range(steps):
        params, state, opt_state, value = step(params, state, opt_state, jax.random.fold_in(KEY, number))
        losses.append(float(value))
    return params, state, losses


@functools.cache
def reference() -> tuple[Any, Any, list[float]]:
    return train(loss_fn)


@pytest.mark.parametrize("policy", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_training_moves_statistics_as_in_float32(policy: str) -> None:
    _, expected_state, expected = reference()
    params, state, losses = train(dj.autocast(loss_fn, policy))
    np.testing.assert_allclose(losses, expected, rtol=0.02)
    for found, exact in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, rtol=0.02, atol=5e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_dropout_has_the_same_random_bits() -> None:
    def dropped(key: jax.Array, x: jax.Array) -> jax.Array:
        return nn.Dropout(0.5, deterministic=False).apply({}, x, rngs={"dropout": key}) == 0

    np.testing.assert_array_equal(dj.autocast(dropped, "bf16", argnums=())(KEY, X), dropped(KEY, X))


def test_statistics_beside_params_are_state_and_no_weights() -> None:
    def normed(variables: Any, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=True).apply(
            variables, x.astype(jnp.bfloat16) @ jnp.eye(8, dtype=jnp.bfloat16)
        )

    norm = nn.BatchNorm(use_running_average=True).init(KEY, X)
    norm["batch_stats"]["mean"] = norm["batch_stats"]["mean"] + 100.125
    # 100.125 has no BF16
    np.testing.assert_allclose(dj.autocast(normed, "bf16")(norm, X), normed(norm, X), rtol=2e-4)


def test_rules_by_module_path() -> None:
    def predict(params: Any, x: jax.Array) -> jax.Array:
        return MODEL.apply({"params": params, "batch_stats": variables()["batch_stats"]}, x, train=False)

    params = variables()["params"]
    assert operand_dtypes(dj.autocast(predict, "bf16"), params, X) == ["bfloat16", "bfloat16"]
    assert operand_dtypes(dj.autocast(predict, "bf16; Dense_1: compute=float32"), params, X) == ["bfloat16", "float32"]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return x + nn.Dropout(0.5, deterministic=False)(jnp.tanh(nn.Dense(8)(x))), None


class Layers(nn.Module):
    """Three layers of one program, each with its own weights and random bits."""

    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = {"scan": Layer, "remat": nn.remat(Layer), "jit": nn.jit(Layer)}[self.kind]
        scanned = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3)
        return scanned()(x, None)[0]


@pytest.mark.parametrize("kind", ["scan", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("remat", "jit"))])
def test_scan_remat_and_jit_inside(kind: str) -> None:
    stack = Layers(kind)

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        return stack.apply(variables, x, rngs={"dropout": KEY}).sum()

    weights = jax.jit(stack.init)({"params": KEY, "dropout": KEY}, X)
    cast = dj.autocast(loss, "bf16")
    value, grads = jax.jit(jax.value_and_grad(cast))(weights, X)
    expected, expected_grads = jax.jit(jax.value_and_grad(loss))(weights, X)
    np.testing.assert_allclose(value, expected, rtol=0.02, atol=0.5)
    for found, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(found, exact, atol=0.05 * np.abs(exact).max())
    assert set(operand_dtypes(jax.grad(cast), weights, X)) == {"bfloat16"}
    own = [
        eqn for eqn in equations(cast, weights, X) if eqn.primitive.name == "remat2" and eqn.params["policy"] is None
    ]
    assert bool(own) == (kind == "remat")


@pytest.mark.parametrize("around", ["module", "closure", "method", "argument"])
def test_autocast_inside_of_a_module_is_refused(around: str) -> None:
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layer = nn.BatchNorm(use_running_average=False)
            if around == "argument":
                return dj.autocast(lambda layer, x: layer(x), "bf16", argnums=())(layer, x)
            function = {"module": layer, "closure": lambda x: layer(x) + 1, "method": layer.__call__}[around]
            return dj.autocast(function, "bf16", argnums=())(x)

    with pytest.raises(AutocastError, match="around a part of a Linen model"):
        Mixed().init(KEY, X)
