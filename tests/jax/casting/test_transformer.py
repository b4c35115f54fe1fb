"""Gradients of a transformer under autocast against FP64's, leaf by leaf; a scan over layers against the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import duotone.jax as dj

from .equations import assert_near, cosine, counted
from .transformer import batch, loss, parameters, stacked

# 1 - cosine of the worst leaf; BF16 has 8 bits of significand, FP16 11
WORST = {"bf16": 3e-4, "fp16": 5e-6}


_compiled = jax.jit(jax.grad(loss))


def gradients64(params, tokens):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        return jax.tree.map(np.asarray, _compiled(wide, tokens))


def worst_leaf(grads, expected) -> float:
    return max(1 - cosine(*pair) for pair in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True))


def gradients(policy: str, params, tokens):
    """Return gradients of a loss that is multiplied by 1024, which FP16 needs, divided by it again."""
    scaled = jax.jit(jax.grad(lambda params: dj.autocast(loss, policy)(params, tokens) * 1024))
    return jax.tree.map(lambda grad: np.asarray(grad, np.float64) / 1024, scaled(params))


@pytest.mark.parametrize("policy", [pytest.param("bf16"), pytest.param("fp16", marks=pytest.mark.slow)])
def test_gradients_are_near_fp64_s(policy: str) -> None:
    params, tokens = parameters(1), batch()
    assert worst_leaf(gradients(policy, params, tokens), gradients64(params, tokens)) < WORST[policy]


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["float32", "compute"])
@pytest.mark.parametrize("policy", WORST)
def test_gradients_of_a_deeper_one_are_near_fp64_s(policy: str, residual: str) -> None:
    params, tokens = parameters(6), batch()
    text = f"{policy},residual={residual}"
    expected = gradients64(params, tokens)
    assert worst_leaf(gradients(text, params, tokens), expected) < 2 * WORST[policy]
    # of 16-bit weights they are gradients at the rounded weights
    narrow = jax.tree.map(lambda leaf: leaf.astype({"bf16": "bfloat16", "fp16": "float16"}[policy]), params)
    rounded = gradients64(narrow, tokens)
    assert worst_leaf(gradients(text, narrow, tokens), rounded) < 4 * WORST[policy]


def test_a_scan_over_its_layers_equals_them() -> None:
    params, tokens = parameters(2), batch()
    fast = jax.jit(dj.autocast(loss, "bf16"))
    assert_near(fast(stacked(params), tokens), fast(params, tokens), 1e-4)


def test_the_program_grows_by_casts_alone() -> None:
    params, tokens = parameters(2), batch()
    plain, fast = counted(loss, params, tokens), counted(dj.autocast(loss, "bf16", save="everything"), params, tokens)
    casts = fast["convert_element_type"] - plain["convert_element_type"]
    # jits inside are taken out
    assert fast.total() - casts <= plain.total() - plain["jit"]
    assert casts <= 0.25 * plain.total()
