"""Loops and branches: the kinds of a carry settle, a loop equals its turns, gradients of constants are FP32 sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import duotone.jax as dj

from .equations import HALVES, WEIGHT, X, assert_near, bits, equations, operand_dtypes, result_dtypes

STACK = jnp.stack([WEIGHT] * 3)


def layer(h, weight):
    return h + jnp.tanh(h @ weight), None


def unrolled(stack, x):
    for weight in stack:
        x = layer(x, weight)[0]
    return x.sum()


@pytest.mark.parametrize("policy", HALVES)
def test_a_scan_over_layers_equals_the_unrolled_layers(policy: str) -> None:
    scanned = dj.autocast(lambda stack, x: lax.scan(layer, x, stack)[0].sum(), policy)
    fast = dj.autocast(unrolled, policy)
    assert set(operand_dtypes(scanned, STACK, X)) == {HALVES[policy].name}
    # XLA rounds less where it compiles several equations together
    assert_near(jax.jit(scanned)(STACK, X), jax.jit(fast)(STACK, X), 2e-3)
    assert_near(jax.grad(scanned)(STACK, X), jax.grad(fast)(STACK, X), 0.01)


def test_a_recurrent_state_that_meets_16_bits_alone_is_16_bit() -> None:
    def rnn(weight, tokens):
        def cell(h, token):
            h = jnp.tanh(h @ weight + weight[token])
            return h, h

        return lax.scan(cell, jnp.zeros(8), tokens)[1].sum()

    fast = dj.autocast(rnn, "bf16")
    (loop,) = [each for each in equations(fast, WEIGHT, jnp.arange(4)) if each.primitive.name == "scan"]
    assert [str(each.aval.dtype) for each in loop.outvars] == ["bfloat16", "bfloat16"]
    assert_near(fast(WEIGHT, jnp.arange(4)), rnn(WEIGHT, jnp.arange(4)))
    assert_near(jax.grad(fast)(WEIGHT, jnp.arange(4)), jax.grad(rnn)(WEIGHT, jnp.arange(4)), 0.05)


def test_a_counter_and_a_sum_in_the_carry_stay_as_they_are() -> None:
    def total(weight, x):
        def step(carry, _):
            h, count, total = carry
            return (jnp.tanh(h @ weight), count + 1, total + 1.0 + 0.0 * jnp.exp(h).sum()), None

        return lax.scan(step, (x, 0, 0.0), None, length=300)[0][1:]

    count, found = jax.jit(dj.autocast(total, "bf16"))(WEIGHT, X)
    assert count == 300
    assert found.dtype == jnp.float32
    assert found == 300


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (lambda total, product: total + product, 1000),
        (lambda total, product: product + jnp.where(product > 0, total, 0), 1000),
        (lambda total, product: total - product, -1000),
        (lambda total, product: total.at[0].add(product[0]), 1000),
        (lambda mean, product: 0.999 * mean + 0.001 * product, 1 - 0.999**1000),
    ],
)
def test_a_sum_over_turns_is_fp32(turn, expected: float) -> None:
    def total(weight, rows):
        return lax.scan(lambda carry, row: (turn(carry, row @ weight), None), jnp.zeros(1), rows)[0].sum()

    # in BF16 it would end at 256, and the average at 0.5
    found = dj.autocast(total, "bf16")(jnp.ones((4, 1)) / 4, jnp.ones((1000, 4)))
    np.testing.assert_allclose(found, expected, rtol=5e-3)


def _nested(total, product):
    return lax.scan(lambda total, part: (total + part, None), total, product.reshape(2, 1))[0]


@pytest.mark.parametrize(
    "turn",
    [
        jax.checkpoint(lambda total, product: total + product.sum()),
        lambda total, product: lax.cond(product[0] > 0, lambda: total + product.sum(), lambda: total),
        _nested,
    ],
)
def test_a_sum_over_turns_is_fp32_inside_of_other_programs(turn) -> None:
    def total(weight, rows):
        return lax.scan(lambda carry, row: (turn(carry, row @ weight), None), jnp.zeros(1), rows)[0].sum()

    assert dj.autocast(total, "bf16")(jnp.ones((4, 2)) / 8, jnp.ones((1000, 4))) == 1000


def test_a_sum_over_the_turns_of_a_while_loop_is_fp32() -> None:
    def total(weight, rows):
        def turn(carry):
            place, total = carry
            return place + 1, total + rows[place] @ weight

        return lax.while_loop(lambda carry: carry[0] < len(rows), turn, (0, jnp.zeros(1)))[1].sum()

    assert dj.autocast(total, "bf16")(jnp.ones((4, 1)) / 4, jnp.ones((1000, 4))) == 1000


def test_a_residual_stream_in_a_carry_is_16_bit() -> None:
    fast = dj.autocast(lambda stack, x: lax.scan(layer, x @ stack[0], stack)[0].sum(), "bf16")
    (loop,) = [each for each in equations(fast, STACK, X) if each.primitive.name == "scan"]
    assert [str(each.aval.dtype) for each in loop.outvars] == ["bfloat16"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_scan_s_constants_are_added_in_fp32(dtype: str) -> None:
    def loss(weight, x):
        return lax.scan(lambda c, row: (c, (row @ weight).sum()), 0.0, x)[1].sum()

    ones, rows = jnp.ones((2, 2), dtype), jnp.ones((1000, 1, 2))
    # BF16 alone would end at 256
    assert jax.grad(dj.autocast(loss, "bf16"))(ones, rows)[0, 0] == 1000


def test_gradients_of_16_bit_activations_in_a_scan_are_added_in_fp32() -> None:
    def loss(weight, x):
        memory = weight @ weight
        return lax.scan(lambda c, row: (c, (row @ memory).sum()), 0.0, x)[1].sum()

    fast, rows = dj.autocast(loss, "bf16"), jnp.ones((1000, 1, 2))
    assert_near(jax.grad(fast)(jnp.eye(2), rows), jax.grad(loss)(jnp.eye(2), rows), 0.01)


def test_16_bit_weights_are_scanned_as_16_bit_weights() -> None:
    fast = dj.autocast(lambda stack, x: lax.scan(layer, x, stack)[0].sum(), "bf16")
    for dtype in (jnp.bfloat16, jnp.float32):
        (loop,) = [each for each in equations(fast, STACK.astype(dtype), X) if each.primitive.name == "scan"]
        # the last is the stack
        assert loop.invars[-1].aval.dtype == dtype
    narrow = STACK.astype(jnp.bfloat16)
    assert np.array_equal(bits(fast(narrow, X)), bits(fast(narrow.astype(jnp.float32), X)))


def test_constants_of_a_body_and_reverse_and_unroll() -> None:
    table = np.linspace(0, 1, 8, dtype=np.float32)

    def loss(weight, x):
        found = lax.scan(lambda c, row: (c * 0.5 + row @ weight + table, c), jnp.zeros(8), x, reverse=True, unroll=2)
        return found[0], found[1]

    for found, expected in zip(dj.autocast(loss, "bf16")(WEIGHT, X), loss(WEIGHT, X), strict=True):
        assert_near(found, expected)


def test_fori_and_while_loops() -> None:
    def known(weight, x):
        return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ weight), x).sum()

    def unknown(weight, x):
        return lax.while_loop(lambda h: (h**2).sum() > 0.5, lambda h: 0.5 * (h @ weight), x).sum()

    for loop in (known, unknown):
        fast = dj.autocast(loop, "bf16")
        assert set(operand_dtypes(fast, WEIGHT, X)) == {"bfloat16"}
        assert_near(jax.jit(fast)(WEIGHT, X), loop(WEIGHT, X))
    assert_near(jax.grad(dj.autocast(known, "bf16"))(WEIGHT, X), jax.grad(known)(WEIGHT, X), 0.05)


def test_branches_are_joined() -> None:
    def forward(weight, x):
        return lax.cond(x.sum() > 0, lambda a: a @ weight, lambda a: jnp.exp(a * 0.1), x)

    fast = dj.autocast(forward, "bf16")
    (branch,) = [each for each in equations(fast, WEIGHT, X) if each.primitive.name == "cond"]
    assert [str(each.aval.dtype) for each in branch.outvars] == ["float32"]
    for x in (X, -X):
        assert_near(jax.jit(fast)(WEIGHT, x), forward(WEIGHT, x))
    assert_near(jax.grad(lambda w: fast(w, X).sum())(WEIGHT), jax.grad(lambda w: forward(w, X).sum())(WEIGHT))


def test_a_switch_of_16_bit_branches_is_16_bit() -> None:
    def forward(weight, x, index):
        h = x @ weight
        return lax.switch(index, [lambda a: a @ weight, lambda a: a, lambda a: -a], h)

    fast = dj.autocast(forward, "bf16")
    (branch,) = [each for each in equations(fast, WEIGHT, X, 1) if each.primitive.name == "cond"]
    assert [str(each.aval.dtype) for each in branch.outvars] == ["bfloat16"]
    for index in range(3):
        assert_near(fast(WEIGHT, X, jnp.int32(index)), forward(WEIGHT, X, index))


def test_a_branch_for_another_platform_is_not_compiled_here() -> None:
    def forward(weight, x):
        return lax.platform_dependent(x @ weight, tpu=jnp.cos, default=lambda a: a * 2)

    fast = jax.jit(dj.autocast(forward, "bf16"))
    assert "cosine" not in fast.lower(WEIGHT, X).as_text()
    assert_near(fast(WEIGHT, X), forward(WEIGHT, X))


def test_map_and_associative_scan() -> None:
    def forward(weight, x):
        sums = lax.associative_scan(lambda a, b: a * 0.5 + b, x @ weight)
        return sums + lax.map(lambda row: row @ weight, x)

    assert_near(jax.jit(dj.autocast(forward, "bf16"))(WEIGHT, X), forward(WEIGHT, X))


def test_loops_in_loops_settle() -> None:
    def forward(weight, x):
        def outer(h, _):
            inner = lax.scan(lambda c, w: (jnp.tanh(c @ weight) + w, None), h, weight[:5])[0]
            return lax.cond(h.sum() > 0, lambda a: a, lambda a: a * 0.5, inner), inner.sum()

        return lax.scan(outer, x[0], None, length=3)

    for found, expected in zip(dj.autocast(forward, "bf16")(WEIGHT, X), forward(WEIGHT, X), strict=True):
        assert_near(found, expected, 0.03)


def test_a_loop_without_floats_is_left_alone() -> None:
    def forward(weight, x):
        n, keys = lax.scan(lambda c, k: (c + 1, jax.random.fold_in(k, c)), 0, jax.random.split(jax.random.key(0), 3))
        return (x @ weight) * n, jax.random.key_data(keys)

    found, expected = dj.autocast(forward, "bf16")(WEIGHT, X), forward(WEIGHT, X)
    assert_near(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


def test_results_of_loops_are_what_their_types_say() -> None:
    fast = dj.autocast(lambda w, x: lax.scan(lambda c, row: (c, row @ w), 0, x)[1] @ w, "bf16")
    assert result_dtypes(fast, WEIGHT, X) == ["bfloat16", "bfloat16"]
