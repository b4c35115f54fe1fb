"""Sums that a function writes out: FP32 from zeros on, rounded once, or FP32 in a loop; and what they do not widen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import duotone.jax as dj

from .equations import HALVES, WEIGHT, X, assert_near, equations, result_dtypes

# in BF16, 256 and 1 add up to 256
TERMS = jnp.ones((9, 4)).at[0].set(256.0)
COLUMN = jnp.ones((4, 1)) / 4


def term(weight, row):
    return row @ weight


def terms(weight, rows):
    return [term(weight, row) for row in rows]


def gate(weight, row):
    # 1, in 16 bits
    return jnp.tanh(term(weight, row) * 256)


def from_zeros(weight, rows):
    total = jnp.zeros(1)
    for row in rows:
        total = total + gate(weight, row) * term(weight, row)
    return total


def gated(weight, rows):
    total = jnp.zeros(1)
    for row in rows:
        total = gate(weight, row) * total + term(weight, row)
    return total


def gated_from_a_term(weight, rows):
    total = term(weight, rows[0])
    for row in rows[1:]:
        total = total * gate(weight, row) + term(weight, row)
    return total


def chosen(weight, rows):
    total = term(weight, rows[0])
    for row in rows[1:]:
        total = jnp.where(row[0] > 0, total + term(weight, row), total)
    return total


def added_in_place(weight, rows):
    total = jnp.zeros(3)
    for row in rows:
        total = total.at[1].add(term(weight, row)[0])
    return total[1:2]


def added_in_place_to_a_term(weight, rows):
    total = jnp.concatenate([term(weight, rows[0])] * 3)
    for row in rows[1:]:
        total = total.at[1].add(term(weight, row)[0])
    return total[1:2]


def set_in_place(weight, rows):
    total = jnp.zeros(3)
    for row in rows:
        total = total.at[1].set(total[1] + term(weight, row)[0])
    return total[1:2]


def in_pairs(weight, rows):
    a, b, c, d, e, f, g, h, i = terms(weight, rows)
    return (a + b) + (c + d) + ((e + f) + (g - -h)) + i


WRITTEN_OUT = [
    from_zeros,
    gated,
    gated_from_a_term,
    chosen,
    added_in_place,
    added_in_place_to_a_term,
    set_in_place,
    in_pairs,
    lambda weight, rows: sum(terms(weight, rows)),
    lambda weight, rows: functools.reduce(jnp.add, terms(weight, rows)),
]


def scanned(turn, first=term):
    def total(weight, rows):
        return lax.scan(lambda carry, row: (turn(weight, carry, row), None), first(weight, rows[0]), rows[1:])[0]

    return total


def with_sums_so_far(weight, rows):
    def turn(carry, row):
        total = carry + term(weight, row)
        return total, total

    return lax.scan(turn, term(weight, rows[0]), rows[1:])[1][-1]


def in_a_while_loop(weight, rows):
    return lax.fori_loop(1, jnp.int32(9), lambda place, total: total + term(weight, rows[place]), term(weight, rows[0]))


def in_a_slot(weight, rows):
    return lax.scan(lambda slots, row: (slots.at[1].set(slots[1] + term(weight, row)[0]), None), jnp.zeros(3), rows)[0][
        1:2
    ]


def in_a_loop_in_a_loop(weight, rows):
    def turn(carry, row):
        return lax.scan(lambda total, _: (total + term(weight, row), None), carry, jnp.arange(1))[0], None

    return lax.scan(turn, term(weight, rows[0]), rows[1:])[0]


IN_LOOPS = [
    scanned(lambda weight, total, row: total + term(weight, row)),
    scanned(lambda weight, total, row: gate(weight, row) * total + term(weight, row)),
    scanned(lambda weight, total, row: total + term(weight, row), lambda weight, row: weight[0] * 1024),
    scanned(lambda weight, total, row: total.at[0].add(term(weight, row)[0])),
    scanned(jax.checkpoint(lambda weight, total, row: total + term(weight, row))),
    scanned(lambda weight, total, row: lax.cond(row[0] > 0, lambda: total + term(weight, row), lambda: total)),
    with_sums_so_far,
    in_a_while_loop,
    in_a_slot,
    in_a_loop_in_a_loop,
]


@pytest.mark.parametrize("total", WRITTEN_OUT + IN_LOOPS)
def test_a_sum_is_right(total) -> None:
    fast = dj.autocast(total, "bf16")
    assert fast(COLUMN, TERMS) == total(COLUMN, TERMS) == 264


@pytest.mark.parametrize("total", [from_zeros, gated, chosen, added_in_place, in_pairs, *IN_LOOPS[:2], in_a_slot])
def test_its_gradient_is_right(total) -> None:
    fast, wide = (
        jax.grad(lambda weight, each=each: each(weight, TERMS).sum()) for each in (dj.autocast(total, "bf16"), total)
    )
    assert_near(fast(COLUMN), wide(COLUMN), 0.01)


def test_a_state_that_is_gated_and_added_to_is_fp32() -> None:
    def total(weight, rows):
        def turn(state, row):
            return gate(weight, row) * state + term(weight, row), None

        return lax.scan(turn, jnp.zeros(1), rows)[0]

    # in BF16 it would end at 256
    assert dj.autocast(total, "bf16")(COLUMN, jnp.ones((1000, 4))) == 1000


def last_dtype(function) -> str:
    """Return the dtype that the function's result has before it leaves autocast in FP32."""
    program = equations(dj.autocast(function, "bf16", save="everything"), WEIGHT, X)
    *_, before, last = program
    return str((before if last.primitive.name == "convert_element_type" else last).outvars[0].aval.dtype)


@pytest.mark.parametrize(
    "function",
    [
        lambda weight, x: x @ weight * 1.0 + 0.0,
        lambda weight, x: jnp.where(x > 0, x @ weight, 0.0) + x @ weight,
        lambda weight, x: jnp.maximum(x @ weight, jnp.zeros_like(x)) + x @ weight,
        lambda weight, x: lax.select(x > 0, x @ weight, jnp.zeros_like(x)) + x @ weight,
        lambda weight, x: jnp.concatenate([jnp.zeros((1, 8)), x @ weight])[:5] + x @ weight,
        lambda weight, x: jnp.zeros((5, 8)).at[:2].set((x @ weight)[:2]) + x @ weight,
        lambda weight, x: jnp.pad(x @ weight, ((1, 0), (0, 0)))[:5] + x @ weight,
        lambda weight, x: (x @ weight) * jnp.ones(8) + x @ weight,
        lambda weight, x: x @ weight + weight[0] + jnp.tanh(x @ weight) + x @ weight,
    ],
)
def test_zeros_that_nothing_is_added_to_widen_nothing(function) -> None:
    assert last_dtype(function) == "bfloat16"
    assert_near(dj.autocast(function, "bf16")(WEIGHT, X), function(WEIGHT, X))


def test_zeros_that_16_bits_are_added_to_are_fp32() -> None:
    assert last_dtype(lambda weight, x: jnp.zeros((5, 8)) + x @ weight) == "float32"


def test_a_count_does_not_widen_what_it_is_multiplied_with() -> None:
    def function(weight, x):
        count = lax.while_loop(lambda count: count < 3.0, lambda count: count * 2.0, 1.0)
        return (x @ weight) * count + x @ weight

    assert last_dtype(function) == "bfloat16"


def test_a_carry_that_is_read_otherwise_too_is_in_its_own_format() -> None:
    def stream(weight, x):
        return lax.scan(lambda h, _: (h + jnp.tanh(h @ weight), None), x @ weight, None, length=3)[0]

    assert set(result_dtypes(dj.autocast(stream, "bf16"), WEIGHT, X, of="scan")) == {"bfloat16"}


@pytest.mark.parametrize("policy", HALVES)
def test_a_sum_is_rounded_once(policy: str) -> None:
    def total(weight, x):
        product = x @ weight
        return ((product + 0.1) * product + weight[0]) + (product - weight[1])

    fast = dj.autocast(total, f"{policy},output={HALVES[policy]}", save="everything")
    # of 4 additions and a product only the last is rounded
    program = equations(fast, WEIGHT, X)
    assert {str(each.outvars[0].aval.dtype) for each in program if each.primitive.name in ("add", "sub", "mul")} == {
        "float32"
    }
    product = np.asarray((X @ WEIGHT).astype(HALVES[policy]), np.float32)
    weight = np.asarray(WEIGHT)
    expected = ((product + np.float32(0.1)) * product + weight[0]) + (product - weight[1])
    assert_near(fast(WEIGHT, X), expected, float(jnp.finfo(HALVES[policy]).eps))


def test_a_mask_after_a_sum_stays_finite() -> None:
    def masked(weight, x):
        return jnp.where(x > 0, x @ weight + weight[0], -1e9)

    assert jnp.isfinite(dj.autocast(masked, "fp16,output=float16")(WEIGHT, X)).all()
