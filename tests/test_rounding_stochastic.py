"""Stochastic rounding: where exactly the threshold lies, and that the mean over draws is the value itself."""

import math
from fractions import Fraction

import numpy as np
import pytest

from duotone.formats import FORMATS
from duotone.rounding import encode, round_to


def test_stochastic_bfloat16_is_add_and_truncate() -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 200_000, np.uint32)
    # subnormals are too rare among these
    bits[:1000] &= 0x807FFFFF
    bits = bits[np.isfinite(bits.view(np.float32))]
    random_bits = rng.integers(0, 2**16, bits.size, np.uint16)
    codes = encode(bits.view(np.float32), "bf16", mode="stochastic", random_bits=random_bits)
    np.testing.assert_array_equal(codes, (bits + random_bits) >> 16)


@pytest.mark.parametrize("draw_dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize(
    ("value", "name", "below", "above"),
    [
        (1 + 2**-10 * 0.3, "float16", 1.0, 1 + 2**-10),
        (-(2**-24) * 0.7, "float16", -0.0, -(2**-24)),
        (65504 + 32 * 0.4, "float16", 65504.0, np.inf),
        (-(448 + 32 * 0.4), "float8_e4m3fn", -448.0, -np.nan),
        (2.0**-163 * 1.75, "bfloat16", 0.0, 2.0**-133),
        # 2^-941 of the spacing, far less than the last random bit
        (5e-324, "bfloat16", 0.0, 2.0**-133),
    ],
)
def test_stochastic_threshold_is_exact(value: float, name: str, below: float, above: float, draw_dtype: type) -> None:
    format, width = FORMATS[name], 8 * np.dtype(draw_dtype).itemsize
    spacing = Fraction(2) ** (max(math.frexp(value)[1] - 1, format.min_exponent) - format.stored_bits)
    fraction = abs(Fraction(value)) / spacing % 1
    first_up = 2**width - math.floor(fraction * 2**width)
    draws = [0, first_up - 1, min(first_up, 2**width - 1), 2**width - 1]
    expected = [above if draw >= first_up else below for draw in draws]
    rounded = round_to(np.full(4, value), name, mode="stochastic", random_bits=np.array(draws, draw_dtype))
    np.testing.assert_array_equal(rounded.view(np.uint64), np.array(expected).view(np.uint64))


@pytest.mark.parametrize("draw_dtype", [np.uint8, np.uint16])
def test_stochastic_probability_is_the_fraction_over_all_draws(draw_dtype: type) -> None:
    draws = np.arange(np.iinfo(draw_dtype).max + 1, dtype=draw_dtype)
    for quarter in range(4):
        value = 1 + 2**-7 * quarter / 4
        rounded = round_to(np.full(draws.size, value), "bf16", mode="stochastic", random_bits=draws)
        assert rounded.mean() == value


def test_stochastic_mean_is_unbiased() -> None:
    count, fraction = 1_000_000, 0.3
    value = 1 + 2**-7 * fraction
    random_bits = np.random.default_rng(4).integers(0, 2**32, count, np.uint32)
    rounded = round_to(np.full(count, value), "bf16", mode="stochastic", random_bits=random_bits)
    ups = np.count_nonzero(rounded == 1 + 2**-7)
    assert ups + np.count_nonzero(rounded == 1) == count
    # hoeffding: a right rounder is further off than this with probability 1e-9 at most
    assert abs(ups - count * fraction) < math.sqrt(count * math.log(2e9) / 2)
