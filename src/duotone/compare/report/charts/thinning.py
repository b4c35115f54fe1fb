"""Curves as few points: the mean over seeds, the range around it, and no more points than a chart can show."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from duotone.compare.report.report import Curve


@dataclass(frozen=True)
class Line:
    """An arm's losses over the seeds.

    Attributes:
        steps: in order.
        values: mean over the seeds that came as far; the line ends before the first value that is not finite.
        lower: the smallest of a seed.
        upper: the largest of a seed.
        step_seconds: mean over the seeds of their medians.
        broke_at: the step of the first value that is not finite, or None.
    """

    steps: tuple[float, ...]
    values: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    step_seconds: float
    broke_at: int | None


def mean_line(curves: Sequence[Curve], points: int) -> Line:
    """Return the line of an arm's runs, thinned to at most so many points.

    Several pairs that fall into one point are averaged, so that a spike still counts.

    >>> line = mean_line([Curve(0, ((1, 4.0), (2, 2.0), (3, math.nan)), (), (), 0.5)], points=10)
    >>> line.values, line.broke_at
    ((4.0, 2.0), 3)
    """
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for step, loss in curve.losses:
            by_step.setdefault(step, []).append(loss)
    steps = sorted(by_step)
    broke_at = next((step for step in steps if not all(map(math.isfinite, by_step[step]))), None)
    whole = [step for step in steps if broke_at is None or step < broke_at]
    size = max(1, math.ceil(len(whole) / points))
    bins = [whole[start : start + size] for start in range(0, len(whole), size)]
    seconds = [curve.step_seconds for curve in curves if curve.step_seconds > 0]
    return Line(
        # a single pair stays at its own step; a point for several stands at the last, as a pair does for its steps
        steps=tuple(float(steps_of[-1]) for steps_of in bins),
        values=tuple(fmean(fmean(by_step[step]) for step in steps_of) for steps_of in bins),
        lower=tuple(fmean(min(by_step[step]) for step in steps_of) for steps_of in bins),
        upper=tuple(fmean(max(by_step[step]) for step in steps_of) for steps_of in bins),
        step_seconds=fmean(seconds) if seconds else 0.0,
        broke_at=broke_at,
    )
