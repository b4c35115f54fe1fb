"""How figures are written: the one place that the page, Markdown and the terminal take their digits from.

Times and bytes have three significant digits, ratios two decimals, qualities four. Units are decimal (1 kB is 1000
bytes). What is not finite is written as `nan`, `inf` or `-inf`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from duotone.compare.report.report import Spread

_TIMES = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"))
# speeds that differ by less are called the same
_EQUAL = 0.02
_SIZES = ((1, "bytes"), (10**3, "kB"), (10**6, "MB"), (10**9, "GB"), (10**12, "TB"))


def seconds(value: float) -> str:
    """Return a time in the unit that suits it.

    >>> seconds(0.00182), seconds(0.9996), seconds(42), seconds(754)
    ('1.82 ms', '1.00 s', '42.0 s', '12.6 min')
    """
    # up to two minutes people count seconds
    units = [(size, unit) for size, unit in _TIMES if size <= 1 or value >= 2 * size]
    return _in_unit(value, units)


def milliseconds(value: float) -> str:
    """Return a time as a number of milliseconds, for columns whose head says so.

    >>> milliseconds(0.00182), milliseconds(1.0234)
    ('1.82', '1020')
    """
    return _digits(value * 1000)


def size(value: float) -> str:
    """Return bytes in the unit that suits them.

    >>> size(512), size(109_830_144), size(2e9)
    ('512 bytes', '110 MB', '2.00 GB')
    """
    return f"{value:.0f} bytes" if abs(value) < 1000 else _in_unit(value, _SIZES)


def count(value: float) -> str:
    """Return a number of things, with thousands set apart.

    >>> count(1_000_000), count(2.5)
    ('1,000,000', '2.5')
    """
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def rate(value: float) -> str:
    """Return a number of units per second.

    >>> rate(20481.6), rate(2.5)
    ('20,500', '2.50')
    """
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else _digits(value)


def plain(value: float) -> str:
    """Return a number with three significant digits at most.

    >>> plain(14.0), plain(6.0631)
    ('14', '6.06')
    """
    return f"{value:.3g}"


def ratio(value: float) -> str:
    """Return a ratio.

    >>> ratio(1.7234), ratio(0.0123), ratio(123.4)
    ('1.72', '0.012', '123')
    """
    if not math.isfinite(value) or abs(value) >= 99.995:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 0.0995 else f"{value:.2g}"


def quality(value: float) -> str:
    """Return a quality, or a difference of two: four decimals, fewer from 10 on, and three digits of small ones.

    >>> quality(2.40118), quality(0.979), quality(1234.567), quality(0.000123456), quality(0.0)
    ('2.4012', '0.9790', '1234.6', '0.000123', '0.0000')
    """
    if not math.isfinite(value) or value == 0:
        return f"{abs(value) if value == 0 else value:.4f}"
    if abs(value) < 0.001:
        return f"{value:.3g}"
    # rounded first, so that 9.99999 has the digits of 10
    whole_digits = math.floor(math.log10(abs(float(f"{value:.5g}"))))
    return f"{value:.{max(0, 4 - max(0, whole_digits))}f}"


def percent(value: float) -> str:
    """Return a fraction in percent.

    >>> percent(0.95), percent(0.005)
    ('95 %', '0.5 %')
    """
    return f"{100 * value:g} %"


def spread(figure: Spread, digits: Callable[[float], str]) -> str:
    """Return a figure with its range; without one, if nothing is known of it.

    Args:
        figure: what is written.
        digits: how each of its numbers is: `ratio`, `quality`, `seconds`, ...

    >>> spread(Spread(1.7234, 1.66, 1.79), ratio), spread(Spread(0.5, 0.5, 0.5), ratio)
    ('1.72 (1.66 to 1.79)', '0.50')
    """
    span = range_of(figure, digits)
    return f"{digits(figure.value)} ({span})" if span else digits(figure.value)


def range_of(figure: Spread, digits: Callable[[float], str]) -> str:
    """Return a range alone, its unit once if both ends have the same; nothing if nothing is known of it.

    >>> range_of(Spread(1.72, 1.66, 1.79), ratio), range_of(Spread(0.5, 0.5, 0.5), ratio)
    ('1.66 to 1.79', '')
    >>> range_of(Spread(1.16, 1.13, 1.21), seconds), range_of(Spread(1.0, 0.99, 1.01), seconds)
    ('1.13 to 1.21 s', '990 ms to 1.01 s')
    """
    if figure.lower == figure.upper or math.isnan(figure.value):
        return ""
    lower, upper = digits(figure.lower), digits(figure.upper)
    unit = " " + upper.rpartition(" ")[2]
    return f"{lower.removesuffix(unit)} to {upper}"


def speed(times_faster: Spread, other: str) -> str:
    """Return what a ratio of speeds means, said the way in which it is above 1.

    >>> speed(Spread(1.72, 1.66, 1.79), "fp32")
    'faster than fp32 by 1.72 (1.66 to 1.79)'
    >>> speed(Spread(0.95, 0.92, 0.98), "fp32")
    'slower than fp32 by 1.05 (1.02 to 1.09)'
    >>> speed(Spread(1.01, 0.99, 1.015), "fp32"), speed(Spread(0.88, 0.72, 1.19), "fp32")
    ('as fast as fp32: 1.01 (0.99 to 1.01)', 'not distinguishable from fp32 in speed: 0.88 (0.72 to 1.19)')
    """
    match direction(times_faster):
        case "faster":
            return f"faster than {other} by {spread(times_faster, ratio)}"
        case "slower":
            slower = Spread(1 / times_faster.value, 1 / times_faster.upper, 1 / times_faster.lower)
            return f"slower than {other} by {spread(slower, ratio)}"
        case "as fast":
            return f"as fast as {other}: {spread(times_faster, ratio)}"
        case "open":
            return f"not distinguishable from {other} in speed: {spread(times_faster, ratio)}"


def direction(times_faster: Spread) -> Literal["faster", "slower", "as fast", "open"]:
    """Return which way a ratio of speeds goes: "as fast" if its interval is within 2 % of 1, "open" if it holds 1.

    >>> direction(Spread(1.2, 1.1, 1.3)), direction(Spread(1.2, 0.9, 1.3)), direction(Spread(0.998, 0.997, 0.999))
    ('faster', 'open', 'as fast')
    """
    if times_faster.lower >= 1 - _EQUAL and times_faster.upper <= 1 + _EQUAL:
        return "as fast"
    if times_faster.lower <= 1 <= times_faster.upper:
        return "open"
    return "faster" if times_faster.lower > 1 else "slower"


def memory(times: float) -> str:
    """Return what a ratio of two peaks means.

    >>> memory(0.55), memory(1.2), memory(1.001)
    ('takes 0.55 of its memory', 'takes 1.20 times its memory', 'takes as much memory')
    """
    if ratio(times) == ratio(1.0):
        return "takes as much memory"
    return f"takes {ratio(times)} {'of' if times < 1 else 'times'} its memory"


def worse(value: float) -> str:
    """Return how much worse a quality is, or better.

    >>> worse(0.0069), worse(-0.01)
    ('0.0069 worse', '0.0100 better')
    """
    return f"{quality(abs(value))} {'worse' if value >= 0 else 'better'}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "seed"), counted(1400, "step")
    ('1 seed', '1,400 steps')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(texts: Sequence[str]) -> str:
    """Return a list as a sentence has it.

    >>> listed(["fp32"]), listed(["fp32", "bf16", "fp16"])
    ('fp32', 'fp32, bf16 and fp16')
    """
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _in_unit(value: float, units: Sequence[tuple[float, str]]) -> str:
    if not math.isfinite(value):
        return f"{value}"
    # rounded first, so that 999.9 ms becomes a second
    rounded = float(f"{value:.3g}")
    factor, unit = next((each for each in reversed(units) if abs(rounded) >= each[0]), units[0])
    return f"{_digits(value / factor)} {unit}"


def _digits(value: float) -> str:
    """Return a number with three significant digits and no exponent."""
    rounded = float(f"{value:.3g}")
    if not math.isfinite(rounded) or rounded == 0:
        return f"{abs(rounded) if rounded == 0 else rounded:g}"
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"
