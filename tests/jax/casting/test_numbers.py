"""Numbers of a program that 16 bits do not have: masks, guards, averages, bounds."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import duotone.jax as dj
from duotone.jax.casting import numbers

from .equations import HALVES, WEIGHT, X, assert_near, operand_dtypes, result_dtypes

FP16, BF16 = HALVES["fp16"], HALVES["bf16"]


@pytest.mark.parametrize(
    ("number", "dtype", "expected"),
    [
        (-1e9, FP16, -65504.0),
        (1e-12, FP16, 2.0**-24),
        (-1e-12, FP16, -(2.0**-24)),
        (1e-40, BF16, 1e-40),
        (1e-45, BF16, 2.0**-133),
        (3.4e38, BF16, float(jnp.finfo("bfloat16").max)),
        (np.inf, FP16, np.inf),
        (0.0, FP16, 0.0),
    ],
)
def test_held(number: float, dtype, expected: float) -> None:
    assert numbers.held(number, dtype) == expected
    found = float(numbers.cast(jnp.float32(number), dtype, number))
    # CPUs may flush the smallest to 0
    assert found == expected or abs(expected) < 2.0**-126
    assert np.isnan(numbers.held(np.nan, dtype))


def test_every_fp16_number_is_exact_and_none_is_lost() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    assert all(numbers.is_exact(float(each), FP16) and not numbers.is_lost(float(each), FP16) for each in every)
    between = [float(each) * (1 + 2**-12) for each in every[1:100]]
    assert not any(numbers.is_exact(each, FP16) for each in between)


@pytest.mark.parametrize("policy", HALVES)
def test_a_mask_leaves_a_softmax_finite(policy: str) -> None:
    def forward(weight, x):
        scores = x @ weight
        whole = jnp.where(jnp.zeros((5, 8), bool), scores, -1e9)
        causal = jnp.where(jnp.tri(5, 8) > 0, scores, -1e9)
        return jax.nn.softmax(whole), jax.nn.softmax(causal), jnp.full_like(scores, -1e9) + scores

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, causal, added = dj.autocast(forward, policy)(WEIGHT, X)
    assert_near(whole, np.full((5, 8), 1 / 8))
    assert_near(causal, forward(WEIGHT, X)[1])
    assert np.isfinite(added).all()


def test_a_mask_of_16_bits_stays_16_bit() -> None:
    fast = dj.autocast(lambda w, x: jnp.where(x > 0, x @ w, -1e9), "fp16")
    assert result_dtypes(fast, WEIGHT, X, of="select_n") == ["float16"]
    assert fast(WEIGHT, -jnp.abs(X)).min() == -65504


@pytest.mark.parametrize(("policy", "dtype"), [("fp16", "float32"), ("bf16", "bfloat16")])
def test_a_guard_that_would_be_zero_makes_the_result_fp32(policy: str, dtype: str) -> None:
    def forward(weight, x):
        return -(jnp.abs(x @ weight) * 0 / (jnp.abs(x @ weight) * 0 + 1e-12))

    fast = dj.autocast(forward, policy)
    assert result_dtypes(fast, WEIGHT, X, of="neg") == [dtype]
    assert not fast(WEIGHT, X).any()


@pytest.mark.parametrize("policy", HALVES)
def test_an_average_keeps_its_factor(policy: str) -> None:
    # BF16 has 1 in the place of 0.999
    fast = dj.autocast(lambda w, x: (x @ w) * 0.999, policy)
    one = fast(jnp.eye(8) * 128, jnp.ones((5, 8)))
    assert np.array_equal(one, np.full((5, 8), float(np.float32(128 * 0.999).astype(HALVES[policy]))))


def test_numbers_that_are_exact_keep_16_bit_arithmetic() -> None:
    fast = dj.autocast(lambda w, x: (x @ w) * 0.5 + 1, "bf16")
    assert operand_dtypes(fast, WEIGHT, X, of="mul") == ["bfloat16"]
    assert operand_dtypes(fast, WEIGHT, X, of="add") == ["bfloat16"]


@pytest.mark.parametrize(
    ("policy", "low", "high", "dtype"),
    [
        ("fp16", 1e-8, 1.0, "float32"),
        ("bf16", 1e-8, 1.0, "bfloat16"),
        ("bf16", 0.0, 1 - 1e-6, "float32"),
        ("fp16", -1e9, 1e9, "float16"),
        ("fp16", 0.25, 0.5, "float16"),
    ],
)
def test_bounds(policy: str, low: float, high: float, dtype: str) -> None:
    def forward(weight, x):
        return jnp.clip(x @ weight, low, high)

    fast = dj.autocast(forward, policy)
    assert result_dtypes(fast, WEIGHT, X, of="min")[-1] == dtype
    assert_near(fast(WEIGHT, X), forward(WEIGHT, X))
    if 0 < low < 1e-6:
        assert np.log(fast(WEIGHT, X)).min() > -20


def test_a_reciprocal_is_fp32() -> None:
    assert result_dtypes(dj.autocast(lambda w, x: 1 / (x @ w), "bf16"), WEIGHT, X, of="div") == ["float32"]


def test_what_nearly_cancels_is_computed_in_fp32() -> None:
    def forward(weight, x):
        return jax.nn.gelu(x @ weight, approximate=False)

    x = jnp.full((1, 1), -3.0)
    found, expected = dj.autocast(forward, "bf16")(jnp.ones((1, 1)), x), forward(jnp.ones((1, 1)), x)
    # 1 + erf(x / sqrt(2)) in BF16 is 0.00390625 for 0.0026998
    assert_near(found, expected, 0.005)
    assert result_dtypes(dj.autocast(forward, "bf16"), jnp.ones((1, 1)), x, of="erf")[-1:] in (["float32"], [])


def test_differences_before_exponentials_are_exact() -> None:
    fast = dj.autocast(lambda w, x: jnp.exp(x @ w - (x @ w).max(-1, keepdims=True)), "bf16")
    assert operand_dtypes(fast, WEIGHT, X, of="sub") == ["float32"]
    assert operand_dtypes(dj.autocast(lambda w, x: (x @ w - 1) @ w, "bf16"), WEIGHT, X, of="sub") == ["bfloat16"]


def test_counts_and_positions_stay_exact() -> None:
    def forward(weight, x):
        positions = jnp.arange(1000, dtype=jnp.float32)
        angles = jnp.outer(positions, jnp.array([1.0, 0.5]))
        return angles, (x @ weight)[0, 0] * 0 + positions

    angles, positions = dj.autocast(forward, "bf16")(WEIGHT, X)
    assert np.array_equal(angles[:, 0], np.arange(1000))
    assert np.array_equal(positions, np.arange(1000))


@pytest.mark.parametrize("policy", HALVES)
@pytest.mark.parametrize("lowest", [-1e9, float(np.finfo(np.float32).min)])
def test_a_mask_that_is_added_stays_finite(policy: str, lowest: float) -> None:
    def forward(weight, x):
        bias = jnp.where(jnp.zeros((5, 8), bool), 0.0, lowest)
        padding = (1.0 - jnp.zeros((5, 8), bool).astype(jnp.float32)) * lowest
        return jax.nn.softmax(x @ weight + bias), jax.nn.softmax(x @ weight + padding)

    for found in dj.autocast(forward, policy)(WEIGHT, X):
        assert_near(found.sum(-1), np.ones(5))


def test_what_is_chosen_before_an_exponential_is_exact() -> None:
    def forward(weight, x):
        scores = x @ weight
        return jnp.exp(jnp.where(x > 0, scores - scores.max(), scores))

    fast = dj.autocast(forward, "bf16")
    assert operand_dtypes(fast, WEIGHT, X, of="sub") == ["float32"]
    assert result_dtypes(fast, WEIGHT, X, of="select_n") == ["float32"]


@pytest.mark.parametrize("policy", HALVES)
@pytest.mark.parametrize("make", [jax.random.uniform, lambda _, shape, dtype: jnp.arange(8, dtype=dtype)])
def test_16_bit_floats_that_come_of_no_float_are_16_bit(policy: str, make) -> None:
    def loss(weight, x):
        return (make(jax.random.key(0), (8,), HALVES[policy]) * (x @ weight)).sum()

    assert_near(dj.autocast(loss, policy)(WEIGHT, X), loss(WEIGHT, X), 0.02)
