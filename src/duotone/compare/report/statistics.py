"""How figures of several runs become one, with how far it can be relied on.

Speed: the median of ratios between turns of the same round, with the interval of a median by order statistics, which
assumes no distribution (Conover, Practical Nonparametric Statistics, 3.2). Quality: a one-sided paired t test of
non-inferiority (Blackwelder, Controlled Clinical Trials 3, 1982). Left out: corrections for testing several arms.
"""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence

from duotone.compare.plan import Plan
from duotone.compare.records import Phases
from duotone.compare.report.report import Spread, Verdict


def timed(turns: Sequence[Phases]) -> Sequence[Phases]:
    """Return the turns that count: all but the first, which is a warm-up, unless it is the only one."""
    return turns[1:] if len(turns) > 1 else turns


def turn_ratios(baseline: Sequence[Phases], arm: Sequence[Phases]) -> list[float]:
    """Return how many times faster an arm was, for each round that both took part in.

    Args:
        baseline: all turns of one run, in order.
        arm: all turns of the run with the same seed.

    >>> turn_ratios([Phases(9, 3, 3, 3), Phases(2, 1, 1, 0)], [Phases(3, 1, 1, 1), Phases(1, 1, 0, 0)])
    [2.0]
    """
    rounds = min(len(baseline), len(arm))
    pairs = zip(timed(baseline[:rounds]), timed(arm[:rounds]), strict=True)
    # a clock that stood still must not divide by zero
    return [theirs.step / max(ours.step, 1e-9) for theirs, ours in pairs]


def quartiles(values: Sequence[float]) -> Spread:
    """Return the median of at least one value, with the quartiles around it.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    Spread(value=3.0, lower=2.0, upper=4.0)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def mean_and_range(values: Sequence[float]) -> Spread:
    """Return the mean of at least one value, with the smallest and the largest; all NaN if one of them is.

    >>> mean_and_range([1.0, 2.0, 6.0])
    Spread(value=3.0, lower=1.0, upper=6.0)
    """
    if any(math.isnan(value) for value in values):
        return Spread(math.nan, math.nan, math.nan)
    return Spread(statistics.fmean(values), min(values), max(values))


def range_confidence(count: int) -> float:
    """Return how sure it is that the median lies between the smallest and the largest of so many values.

    >>> range_confidence(5), range_confidence(6)
    (0.9375, 0.96875)
    """
    return 1 - 2 * 0.5**count


def median_interval(values: Sequence[float], confidence: float) -> Spread:
    """Return the median of at least one value, with its confidence interval.

    The interval lies between the k-th smallest and the k-th largest value, with the largest k whose confidence is
    enough; where none is (see `range_confidence`), it is all of their range.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.95)
    Spread(value=3.5, lower=1.0, upper=6.0)
    """
    from scipy.stats import quantile_test

    lower, upper = quantile_test(values, p=0.5).confidence_interval(confidence)
    # NaN is SciPy's bound where no value lies far enough outside
    lower, upper = (
        float(end if math.isnan(bound) else bound) for bound, end in ((lower, min(values)), (upper, max(values)))
    )
    return Spread(statistics.median(values), lower, upper)


def times_faster(ratios: Mapping[int, Sequence[float]], confidence: float) -> Spread | None:
    """Return how many times faster an arm is than the baseline: the median of all ratios, with its interval.

    Rounds of one run resemble each other, so the interval is widened until it holds each seed's own median.

    Args:
        ratios: of each round, by seed; see `turn_ratios`.
        confidence: of the interval.

    Returns:
        None without any ratio; with a single one, nothing is known of its interval, and all three are that.

    >>> times_faster({0: [2.0] * 9, 1: [2.5]}, 0.95)
    Spread(value=2.0, lower=2.0, upper=2.5)
    """
    every = [ratio for each in ratios.values() for ratio in each]
    if not every:
        return None
    whole = median_interval(every, confidence)
    medians = [statistics.median(each) for each in ratios.values() if each]
    return Spread(whole.value, min(whole.lower, *medians), max(whole.upper, *medians))


def worse_by(differences: Sequence[float], confidence: float) -> Spread:
    """Return the mean of at least two differences, with its two one-sided confidence bounds by Student's t.

    >>> worse_by([0.25, 0.25, 0.25], 0.95)
    Spread(value=0.25, lower=0.25, upper=0.25)
    """
    from scipy.stats import ttest_1samp

    with warnings.catch_warnings():
        # differences that are all the same: their interval is a point
        warnings.filterwarnings("ignore", "Precision loss occurred", RuntimeWarning)
        warnings.filterwarnings("ignore", "invalid value encountered|divide by zero", RuntimeWarning)
        # two one-sided bounds are a two-sided interval that leaves out as much on both sides
        interval = ttest_1samp(differences, 0.0).confidence_interval(2 * confidence - 1)
    return Spread(statistics.fmean(differences), float(interval.low), float(interval.high))


def judge_quality(
    baseline: Mapping[int, float], arm: Mapping[int, float], plan: Plan, *, lower_is_better: bool
) -> tuple[Spread | None, Verdict]:
    """Return how much worse an arm is than the baseline, and whether that is within the plan's margin.

    - "no worse": the upper bound of the mean difference is at most the margin times the baseline's mean.
    - "worse": the lower bound is above it, or a quality of the arm is not finite.
    - "undecided": it lies between the bounds.
    - "not tested": there is one seed, or one of the plan's seeds lacks a run of either, or the baseline is not finite.

    Args:
        baseline: quality by seed, of finished runs.
        arm: the same.
        plan: for its seeds, its margin and its confidence.
        lower_is_better: which way quality improves.

    Returns:
        The mean with its bounds is None below two seeds that both have finished, and where a quality is not finite.
    """
    if not baseline or not all(map(math.isfinite, baseline.values())):
        return None, "not tested"
    if not all(map(math.isfinite, arm.values())):
        return None, "worse"
    seeds = sorted(baseline.keys() & arm.keys())
    if len(seeds) < 2:
        return None, "not tested"
    sign = 1 if lower_is_better else -1
    worse = worse_by([sign * (arm[seed] - baseline[seed]) for seed in seeds], plan.confidence)
    # a test needs all of the seeds that were planned: runs may be missing because of their quality
    if set(seeds) != set(plan.seeds):
        return worse, "not tested"
    allowed = plan.margin * abs(statistics.fmean(baseline.values()))
    if worse.upper <= allowed:
        return worse, "no worse"
    return worse, "worse" if worse.lower > allowed else "undecided"
