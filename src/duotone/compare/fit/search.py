"""The search for the largest micro-batch that fits into a given memory, by measuring alone.

Memory grows about linearly with the samples, so a line through two measurements says where to measure next:
`n2 + (limit - peak2) * (n2 - n1) / (peak2 - peak1)`. Each measurement costs a process, so few are made. Where the line
misleads (leaps, noise, memory that ran out), steps double and brackets are halved. Left out: guesses from shapes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from duotone.errors import CompareError

# the search ends where so much more, as a fraction, does not fit
TOLERANCE = 0.03
# how much a peak may be off, as a fraction
NOISE = 0.01
# small batches hide in memory that the process holds anyway, so one peak says little about many more samples
FIRST_GROWTH, GROWTH = 4, 8


@dataclass(frozen=True)
class LargestFit:
    """What a search found.

    Attributes:
        samples: the most that were measured to fit; 0 if not even one does.
        peak_bytes: measured there; None if `samples` is 0.
        tried: every number of samples that was measured, in order, with its peak in bytes, None if memory ran out.
        remark: a sentence if more than `samples` might fit, but was not tried; else None.
    """

    samples: int
    peak_bytes: int | None
    tried: tuple[tuple[int, int | None], ...]
    remark: str | None = None


def largest_fitting(
    measure: Callable[[int], int | None], start: int, limit_bytes: int, *, most: int = 2**20
) -> LargestFit:
    """Find the largest number of samples whose peak is at most the limit, to one sample or `TOLERANCE`.

    A number once measured is not measured again, and nothing above one that did not fit. From one measurement the
    search goes up four times at most, later 8 times, so it goes far beyond the limit only where memory leaps.

    Args:
        measure: returns the peak in bytes for a number of samples, or None if memory ran out.
        start: where to begin.
        limit_bytes: of the peak.
        most: where to end.

    Raises:
        CompareError: `start`, `limit_bytes` or `most` is below 1.

    >>> fit = largest_fitting(lambda samples: 100 + 7 * samples, start=20, limit_bytes=1000)
    >>> fit.samples, fit.peak_bytes, [samples for samples, _ in fit.tried]
    (126, 982, [20, 80, 126, 129])
    """
    for name, value in (("start", start), ("limit_bytes", limit_bytes), ("most", most)):
        if value < 1:
            raise CompareError(f"{name} is {value}; it must be at least 1")
    tried: dict[int, int | None] = {}
    # `low` fits, or is 0; `high` does not, or is beyond `most`
    low, high = 0, most + 1
    # how often the search got on little: with small steps upwards, or, once there is an end, with more than half left
    doubt = 0
    while high - low > (_tolerated(low) if high <= most else 1):
        crossing = _crossing(tried, low, limit_bytes)
        samples = _next(crossing, low, high, most, len(tried), doubt) if tried else min(start, most)
        peak = tried[samples] = measure(samples)
        before = low, high
        if peak is not None and peak <= limit_bytes:
            low = samples
        else:
            high = samples
        if high > most:
            doubt += low < 1.5 * before[0]
        else:
            doubt = doubt + 1 if _width(low, high) > 0.5 * _width(*before) else 0
    remark = f"{most:,} samples fit; more were not tried" if low == most else None
    return LargestFit(low, tried.get(low), tuple(tried.items()), remark)


def _crossing(tried: Mapping[int, int | None], low: int, limit: int) -> float:
    """Return where the line through what was measured reaches the limit, and infinity if nothing was."""
    known = sorted((samples, peak) for samples, peak in tried.items() if peak is not None)
    fit, unfit = ([pair for pair in known if (pair[0] <= low) is fits] for fits in (True, False))
    # the two nearest to the limit, on both sides of it if there are; through 0 if there is but one
    pairs = [*fit[-1:], *unfit[:1]] if fit and unfit else [*fit[-2:], *unfit[:2]]
    if not pairs:
        return math.inf
    (n1, peak1), (n2, peak2) = [(0, 0), *pairs][-2:]
    # a line that goes on upwards is as steep as noise lets it be: it may go far
    rise = peak2 - peak1 + (0 if unfit else NOISE * peak2)
    return n2 + (limit - peak2) * (n2 - n1) / max(rise, 1)


def _next(crossing: float, low: int, high: int, most: int, measured: int, doubt: int) -> int:
    """Return what to measure next, above `low` and below `high`."""
    aim = math.floor(min(crossing, high) * (1 - NOISE))
    if high > most:
        growth = FIRST_GROWTH if measured == 1 else GROWTH
        # the first small step is to the line, the second ought to end the search; the more, the larger
        step = _tolerated(low) * 2 ** max(0, doubt - 1)
        return min(max(aim, low + step), low * growth, most)
    # near an end of the bracket, a small step away from it ends the search if the line is right
    least, largest = low + _tolerated(low), high - _tolerated(math.floor(high / (1 + TOLERANCE)))
    if doubt % 2 or crossing >= high or least > largest:
        return min(max(math.isqrt(max(low, 1) * high), low + 1), high - 1)
    return min(max(aim, least), largest)


def _tolerated(samples: int) -> int:
    return max(1, math.floor(TOLERANCE * samples))


def _width(low: int, high: int) -> float:
    # a bracket from 0 counts as one from a half
    return math.log(high / max(low, 0.5))
