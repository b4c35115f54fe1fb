"""autocast inside and around JAX's transforms: the products are 16-bit, results and gradients are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import duotone.jax as dj

from .equations import HALVES, WEIGHT, X, assert_near, bits, operand_dtypes


def loss(weight, x):
    return jnp.tanh(x @ weight).sum()


@pytest.mark.parametrize("policy", HALVES)
def test_products_are_16_bit_and_results_as_traced(policy: str) -> None:
    fast = dj.autocast(lambda weight, x: x @ weight, policy)
    assert operand_dtypes(fast, WEIGHT, X) == [HALVES[policy].name]
    assert fast(WEIGHT, X).dtype == jnp.float32
    assert np.array_equal(
        fast(WEIGHT, X), (X.astype(HALVES[policy]) @ WEIGHT.astype(HALVES[policy])).astype(jnp.float32)
    )


def test_fp32_changes_nothing() -> None:
    assert np.array_equal(bits(dj.autocast(loss, "fp32")(WEIGHT, X)), bits(loss(WEIGHT, X)))


def test_jit_outside_and_inside() -> None:
    fast = dj.autocast(lambda weight, x: jax.jit(lambda a: a @ weight)(x).sum(), "bf16")
    assert operand_dtypes(jax.jit(fast), WEIGHT, X) == ["bfloat16"]
    # XLA may leave out casts inside of a jit, which makes it more exact
    assert_near(fast(WEIGHT, X), jax.jit(fast)(WEIGHT, X))


@pytest.mark.parametrize("policy", HALVES)
def test_grad_outside(policy: str) -> None:
    gradient = jax.grad(dj.autocast(loss, policy))
    assert operand_dtypes(gradient, WEIGHT, X) == [HALVES[policy].name] * 2
    assert gradient(WEIGHT, X).dtype == jnp.float32
    assert_near(gradient(WEIGHT, X), jax.grad(loss)(WEIGHT, X))


def test_grad_inside() -> None:
    fast = dj.autocast(jax.grad(loss), "bf16")
    assert operand_dtypes(fast, WEIGHT, X) == ["bfloat16"] * 2
    assert_near(fast(WEIGHT, X), jax.grad(loss)(WEIGHT, X))


def test_second_order() -> None:
    assert_near(jax.hessian(dj.autocast(loss, "bf16"))(WEIGHT, X), jax.hessian(loss)(WEIGHT, X), 0.05)


def test_vmap_outside_and_inside() -> None:
    inside = dj.autocast(lambda weight, x: jax.vmap(lambda a: a @ weight)(x), "bf16")
    outside = jax.vmap(dj.autocast(lambda weight, a: a @ weight, "bf16"), (None, 0))
    assert operand_dtypes(inside, WEIGHT, X) == operand_dtypes(outside, WEIGHT, X) == ["bfloat16"]
    assert np.array_equal(bits(inside(WEIGHT, X)), bits(outside(WEIGHT, X)))


def test_per_example_gradients() -> None:
    fast = jax.vmap(jax.grad(dj.autocast(loss, "bf16")), (None, 0))(WEIGHT, X)
    assert_near(fast, jax.vmap(jax.grad(loss), (None, 0))(WEIGHT, X))
    assert_near(fast.sum(0), jax.grad(dj.autocast(loss, "bf16"))(WEIGHT, X))


def test_jvp_and_linearize() -> None:
    fast = dj.autocast(lambda weight, x: jnp.tanh(x @ weight), "bf16")
    primal, tangent = jax.jvp(fast, (WEIGHT, X), (WEIGHT, X))
    _, expected = jax.jvp(lambda weight, x: jnp.tanh(x @ weight), (WEIGHT, X), (WEIGHT, X))
    again, linear = jax.linearize(fast, WEIGHT, X)
    assert_near(tangent, expected)
    assert np.array_equal(primal, again)
    assert np.array_equal(tangent, linear(WEIGHT, X))


def test_a_16_bit_weight_is_as_its_fp32_value() -> None:
    narrow = WEIGHT.astype(jnp.bfloat16)
    fast = dj.autocast(loss, "bf16")
    assert np.array_equal(bits(fast(narrow, X)), bits(fast(narrow.astype(jnp.float32), X)))
    gradient, wide = jax.grad(fast)(narrow, X), jax.grad(fast)(narrow.astype(jnp.float32), X)
    assert gradient.dtype == jnp.bfloat16
    assert np.array_equal(bits(gradient), bits(wide.astype(jnp.bfloat16)))


def test_donated_buffers_and_ahead_of_time_compilation() -> None:
    step = jax.jit(dj.autocast(lambda weight, x: weight - 0.1 * (x.T @ x @ weight), "bf16"), donate_argnums=0)
    weight = jnp.ones((8, 8))
    compiled = step.lower(weight, X).compile()
    compiled(weight, X)
    assert weight.is_deleted()


def test_export() -> None:
    fast = jax.jit(dj.autocast(loss, "bf16"))
    exported = export.export(fast)(WEIGHT, X)
    assert np.array_equal(exported.call(WEIGHT, X), fast(WEIGHT, X))


def test_what_is_no_array_is_a_constant() -> None:
    def forward(params, x, mode=None, times=3, scale=2.0):
        assert mode == "train"
        for _ in range(times):
            x = x @ params["a"][0]
        return (x * scale).sum()

    found = dj.autocast(forward, "bf16")({"a": [WEIGHT, None]}, np.asarray(X), mode="train")
    assert_near(found, forward({"a": [WEIGHT]}, X, mode="train"))
