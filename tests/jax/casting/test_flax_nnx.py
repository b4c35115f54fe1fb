"""Flax NNX modules under autocast: what a function changes in them stays, in FP32 and from the same random bits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import duotone.jax as dj

from .equations import operand_dtypes

nnx = pytest.importorskip("flax.nnx")

X = jnp.asarray(np.random.default_rng(0).normal(0.5, 1, (16, 8)), jnp.float32)
Y = jnp.sin(X.sum(-1, keepdims=True))


class Model(nnx.Module):
    """A product, BatchNorm and dropout, then a product."""

    def __init__(self, rngs: Any) -> None:
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def loss_fn(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.square(model(x) - y).mean()


@functools.cache
def first_model() -> Any:
    return Model(nnx.Rngs(0))


def model() -> Any:
    return nnx.clone(first_model())


def train(loss: Callable[..., jax.Array], steps: int = 3) -> tuple[Any, list[float]]:
    trained = model()
    optimizer = nnx.Optimizer(trained, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        value, grads = nnx.value_and_grad(loss)(model, X, Y)
        optimizer.update(model, grads)
        return value

    return trained, [float(step(trained, optimizer)) for _ in range(steps)]


@functools.cache
def reference() -> tuple[Any, list[float]]:
    return train(loss_fn)


@pytest.mark.parametrize("policy", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_training_moves_statistics_and_counts_as_in_float32(policy: str) -> None:
    plain, expected = reference()
    trained, losses = train(dj.autocast(loss_fn, policy))
    np.testing.assert_allclose(losses, expected, rtol=0.02)
    assert trained.dropout.rngs.count[...] == plain.dropout.rngs.count[...] == 3
    for statistic in ("mean", "var"):
        moved, exact = getattr(trained.norm, statistic)[...], getattr(plain.norm, statistic)[...]
        assert moved.dtype == jnp.float32
        np.testing.assert_allclose(moved, exact, rtol=0.02, atol=5e-3)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(trained, nnx.Param)))
    assert set(operand_dtypes(dj.autocast(pure, policy), nnx.split(model())[1], X)) == {dj.Policy.parse(policy).compute}


def pure(state: Any, x: jax.Array) -> jax.Array:
    """Return the loss of a state of the model, by the functional interface."""
    return nnx.merge(nnx.graphdef(model()), state)(x).sum()


def test_dropout_has_the_same_random_bits() -> None:
    def dropped(model: Any, x: jax.Array) -> jax.Array:
        return model.dropout(x) == 0

    first, second = model(), model()
    for _ in range(2):
        np.testing.assert_array_equal(dj.autocast(dropped, "bf16")(first, X), dropped(second, X))


def normalize(model: Any, x: jax.Array) -> jax.Array:
    return model.norm(model.first(x))


def test_state_changes_without_other_transforms_too() -> None:
    changed, exact = model(), model()
    dj.autocast(normalize, "bf16")(changed, x=X)
    normalize(exact, X)
    np.testing.assert_allclose(changed.norm.mean[...], exact.norm.mean[...], atol=2e-4)
    assert np.abs(changed.norm.mean[...]).max() > 5e-3


def test_running_statistics_are_state_and_no_weights() -> None:
    def normed(model: Any, x: jax.Array) -> jax.Array:
        model.eval()
        return model.norm(model.first(x))

    module = model()
    module.norm.mean[...] = module.norm.mean[...] + 100.125
    found = dj.autocast(normed, "bf16")(module, X)
    # 100.125 has no BF16; the product's own rounding is left
    np.testing.assert_allclose(found, normed(module, X), rtol=2e-4)


def test_weights_in_16_bits_stay_so() -> None:
    trained = dj.cast(model(), "bf16")
    before = [leaf.dtype for leaf in jax.tree.leaves(nnx.state(trained))]
    assert jnp.bfloat16 in before
    dj.autocast(loss_fn, "bf16")(trained, X, Y)
    assert [leaf.dtype for leaf in jax.tree.leaves(nnx.state(trained))] == before


def test_two_names_of_one_module_stay_one() -> None:
    class Twice(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.one = nnx.BatchNorm(8, rngs=rngs)
            self.two = self.one

    def call(pair: Any, other: Any, x: jax.Array) -> jax.Array:
        return (pair.one(x) + pair.two(x) + other(x)).sum()

    pair = Twice(nnx.Rngs(0))
    dj.autocast(call, "bf16")(pair, pair.one, X)
    assert pair.one is pair.two
    exact = Twice(nnx.Rngs(0))
    call(exact, exact.one, X)
    np.testing.assert_allclose(pair.one.mean[...], exact.one.mean[...], atol=1e-2)


def test_new_variables_stay() -> None:
    class Remembers(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            self.seen = nnx.Intermediate(x * 2)
            return x

    module = Remembers()
    dj.autocast(lambda module, x: module(x).sum(), "bf16")(module, X)
    np.testing.assert_array_equal(module.seen[...], X * 2)


def test_modules_and_texts_as_results_and_arguments() -> None:
    def call(module: Any, x: jax.Array, mode: str) -> tuple[Any, str, jax.Array]:
        return module.norm, mode, module(x)

    module = model()
    norm, mode, _ = dj.autocast(call, "bf16")(module, X, "train")
    assert norm is module.norm
    assert mode == "train"


def test_the_output_of_a_policy_is_not_the_states() -> None:
    module = model()
    result = dj.autocast(lambda module, x: module(x), "bf16,output=bfloat16")(module, X)
    assert result.dtype == jnp.bfloat16
    assert module.norm.mean[...].dtype == jnp.float32


def test_a_module_that_is_no_argument_is_refused_by_flax() -> None:
    module = model()
    with pytest.raises(Exception, match="different trace level"):
        dj.autocast(lambda x: module(x).sum(), "bf16", argnums=())(X)


class Layer(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dropout(jnp.tanh(self.linear(x)))


@functools.cache
def first_layers(count: int) -> Any:
    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def make(rngs: Any) -> Any:
        return Layer(rngs)

    return make(nnx.Rngs(0))


def layers(count: int) -> Any:
    return nnx.clone(first_layers(count))


def scanned(stack: Any, x: jax.Array) -> jax.Array:
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def turn(layer: Any, x: jax.Array) -> jax.Array:
        return layer(x)

    return turn(stack, x).sum()


def rematted(stack: Any, x: jax.Array) -> jax.Array:
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def turn(layer: Any, x: jax.Array) -> jax.Array:
        return nnx.remat(lambda layer, x: layer(x))(layer, x)

    return turn(stack, x).sum()


@pytest.mark.parametrize("function", [scanned, pytest.param(rematted, marks=pytest.mark.slow)], ids=["scan", "remat"])
def test_scan_and_remat_inside(function: Callable[..., jax.Array]) -> None:
    changed, exact = layers(3), layers(3)
    value, grads = nnx.jit(nnx.value_and_grad(dj.autocast(function, "bf16")))(changed, X)
    expected, reference_grads = nnx.jit(nnx.value_and_grad(function))(exact, X)
    np.testing.assert_allclose(value, expected, rtol=0.02, atol=0.5)
    np.testing.assert_allclose(
        grads["linear"]["kernel"][...],
        reference_grads["linear"]["kernel"][...],
        atol=0.05 * np.abs(reference_grads["linear"]["kernel"][...]).max(),
    )
    np.testing.assert_array_equal(changed.dropout.rngs.count[...], [1, 1, 1])


def test_autocast_inside_of_scan_remat_and_vmap() -> None:
    inner = dj.autocast(lambda layer, x: layer(x), "bf16")

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def turn(layer: Any, x: jax.Array) -> jax.Array:
        return nnx.remat(inner)(layer, x)

    changed, exact = layers(3), layers(3)
    value, _ = nnx.jit(nnx.value_and_grad(lambda stack, x: turn(stack, x).sum()))(changed, X)
    np.testing.assert_allclose(value, nnx.jit(scanned)(exact, X), rtol=0.02, atol=0.5)
    np.testing.assert_array_equal(changed.dropout.rngs.count[...], [1, 1, 1])


def test_autocast_inside_of_vmap() -> None:
    each = nnx.jit(nnx.vmap(dj.autocast(lambda layer, x: layer(x), "bf16"), in_axes=(0, None)))
    stack = layers(3)
    assert each(stack, X).shape == (3, *X.shape)
    np.testing.assert_array_equal(stack.dropout.rngs.count[...], [1, 1, 1])
