"""Digits and units at their edges."""

import math

import pytest

from duotone.compare.report import words
from duotone.compare.report.report import Spread


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 µs"),
        (2.5e-9, "0.00250 µs"),
        (1.234e-5, "12.3 µs"),
        (0.00099951, "1.00 ms"),
        (0.99949, "999 ms"),
        (119.9, "120 s"),
        (120.0, "2.00 min"),
        (7199.0, "120 min"),
        (7200.0, "2.00 h"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert words.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_600, "1.00 MB"),
        (1.5e12, "1.50 TB"),
        (3e16, "30000 TB"),
    ],
)
def test_sizes(value: float, text: str) -> None:
    assert words.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9.99996, "10.000"),
        (-2.40118, "-2.4012"),
        (0.00100, "0.0010"),
        (0.000999, "0.000999"),
        (-0.0, "0.0000"),
        (123456.7, "123457"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_qualities(value: float, text: str) -> None:
    assert words.quality(value) == text


def test_ratios_rates_and_counts() -> None:
    assert [words.ratio(value) for value in (0.0994, 0.0996, 99.99, 99.996, math.inf)] == [
        "0.099", "0.10", "99.99", "100", "inf",
    ]  # fmt: skip
    assert [words.rate(value) for value in (0.01234, 12.345, 1234567)] == [
        "0.0123", "12.3", "1,230,000",
    ]  # fmt: skip
    assert [words.count(value) for value in (0.0, 2, 2.333)] == ["0", "2", "2.3"]
    assert words.milliseconds(0.0) == "0"


def test_a_spread_of_nan_is_one_word() -> None:
    assert words.spread(Spread(math.nan, math.nan, math.nan), words.quality) == "nan"
    assert words.spread(Spread(1.0, 1.0, 2.0), words.ratio) == "1.00 (1.00 to 2.00)"


def test_a_slower_arm_is_said_by_how_much() -> None:
    figure = Spread(0.5, 0.4, 0.8)
    assert words.speed(figure, "fp32") == "slower than fp32 by 2.00 (1.25 to 2.50)"
    assert words.direction(Spread(1.2, 1.0, 1.3)) == "open"
    assert words.direction(Spread(1.025, 1.015, 1.035)) == "faster"
    assert words.direction(Spread(1.0, 0.979, 1.02)) == "open"
    assert words.direction(Spread(1.0, 0.98, 1.02)) == "as fast"
    assert words.direction(Spread(1.004, 1.003, 1.005)) == "as fast"


def test_lists() -> None:
    assert [words.listed(texts) for texts in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "", "a", "a and b", "a, b and c",
    ]  # fmt: skip
    assert words.percent(0.999) == "99.9 %"
