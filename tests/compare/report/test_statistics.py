"""The statistics against independent computations, and against how often they are wrong."""

import math
import random
import statistics
import warnings

import numpy as np
import pytest
from scipy import special, stats

from duotone.compare.plan import Plan
from duotone.compare.records import Phases
from duotone.compare.report.report import Spread
from duotone.compare.report.statistics import (
    judge_quality,
    mean_and_range,
    median_interval,
    quartiles,
    range_confidence,
    times_faster,
    turn_ratios,
    worse_by,
)

from .made_records import Made, made_plan


def turns(*steps: float) -> list[Phases]:
    return [Phases(step, step / 2, step / 4, step / 4) for step in steps]


@pytest.mark.parametrize("count", [1, 2, 5, 24])
def test_quartiles_are_numpys(count: int) -> None:
    values = [random.Random(count).random() for _ in range(count)]
    expected = np.percentile(values, [50, 25, 75])
    figure = quartiles(values)
    assert np.allclose([figure.value, figure.lower, figure.upper], expected, rtol=1e-14)


def test_a_mean_with_nan_in_it_is_nan_wherever_it_stands() -> None:
    for values in ([math.nan, 1.0], [1.0, math.nan]):
        figure = mean_and_range(values)
        assert all(map(math.isnan, (figure.value, figure.lower, figure.upper)))


def test_ratios_are_of_the_same_round_without_the_first() -> None:
    assert turn_ratios(turns(100, 2, 6), turns(1, 1, 2)) == [2.0, 3.0]
    # the shorter run decides, and still the second turn meets the second
    assert turn_ratios(turns(100, 2), turns(1, 1, 2, 5)) == [2.0]
    assert turn_ratios(turns(4), turns(2, 9)) == [2.0]
    assert turn_ratios([], turns(2, 9)) == []


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("count", [6, 11, 30, 69])
def test_a_medians_interval_has_the_narrowest_ranks_that_suffice(count: int, confidence: float) -> None:
    figure = median_interval([float(value) for value in range(count)], confidence)
    rank = int(figure.lower)
    assert figure.upper == count - 1 - rank
    coverage = [1 - 2 * stats.binom.cdf(k, count, 0.5) for k in (rank, rank + 1)]
    if range_confidence(count) >= confidence:
        assert coverage[0] >= confidence - 1e-12
    assert coverage[1] < confidence


def test_too_few_values_give_all_of_their_range() -> None:
    assert range_confidence(5) < 0.95 < range_confidence(6)
    assert median_interval([3.0, 1.0, 2.0], 0.95) == Spread(2.0, 1.0, 3.0)
    assert median_interval([7.0], 0.95) == Spread(7.0, 7.0, 7.0)


def test_a_medians_interval_is_that_of_its_definition() -> None:
    draws = random.Random(3)
    for _ in range(300):
        confidence, count = draws.choice([0.5, 0.8, 0.9, 0.95, 0.99, 0.999]), draws.randrange(1, 80)
        # rounded, so that some values are the same
        values = [round(draws.gauss(0, 1), draws.choice([1, 9])) for _ in range(count)]
        # bdtr(k, n, 1/2) is how likely it is that at most k of n values lie on one side of the median
        outside = [k for k in range(count // 2) if special.bdtr(k, count, 0.5) <= (1 - confidence) / 2]
        k, ordered = max(outside, default=0), sorted(values)
        assert median_interval(values, confidence) == Spread(statistics.median(values), ordered[k], ordered[-1 - k])


def test_the_bounds_of_a_difference_are_those_of_their_definition() -> None:
    draws = random.Random(4)
    for _ in range(300):
        confidence, count = draws.choice([0.5, 0.8, 0.9, 0.95, 0.99, 0.999]), draws.randrange(2, 20)
        differences = [draws.gauss(0.1, 1) * 10 ** draws.uniform(-6, 3) for _ in range(count)]
        mean = statistics.fmean(differences)
        reach = special.stdtrit(count - 1, confidence) * statistics.stdev(differences) / math.sqrt(count)
        figure = worse_by(differences, confidence)
        near = {"rel": 1e-12, "abs": 1e-12 * (abs(mean) + reach)}
        assert figure.lower == pytest.approx(mean - reach, **near)
        assert figure.upper == pytest.approx(mean + reach, **near)


@pytest.mark.parametrize("difference", [0.0, 0.1, -1e-9])
def test_equal_differences_have_no_range_and_no_warning(difference: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = worse_by([difference] * 3, 0.95)
    assert (figure.value, figure.lower, figure.upper) == pytest.approx((difference,) * 3, rel=1e-12, abs=0.0)


@pytest.mark.slow
def test_a_medians_interval_holds_it_as_often_as_it_says() -> None:
    count, trials, draws = 15, 4000, random.Random(0)
    held = 0
    for _ in range(trials):
        # skewed, with a median of 1
        figure = median_interval([draws.lognormvariate(0, 1) for _ in range(count)], 0.9)
        held += figure.lower <= 1 <= figure.upper
    # ranks 5 and 11 of 15 hold the median with exactly this; false alarms of both sides are below 1e-9
    exact = 1 - 2 * stats.binom.cdf(3, count, 0.5)
    assert stats.binom.ppf(5e-10, trials, exact) <= held <= stats.binom.isf(5e-10, trials, exact)


def test_every_seeds_median_lies_in_the_speeds_interval() -> None:
    ratios = {0: [1.0] * 20, 1: [1.01] * 20, 2: [1.5] * 3, 3: []}
    assert median_interval([1.0] * 20 + [1.01] * 20 + [1.5] * 3, 0.95).upper == 1.01
    assert times_faster(ratios, 0.95) == Spread(1.01, 1.0, 1.5)
    assert times_faster({0: [0.9], 1: [1.0] * 20}, 0.95) == Spread(1.0, 0.9, 1.0)


def test_speed_without_rounds_is_none_and_of_one_round_has_no_interval() -> None:
    assert times_faster({}, 0.95) is None
    assert times_faster({0: []}, 0.95) is None
    assert times_faster({0: [1.25]}, 0.95) == Spread(1.25, 1.25, 1.25)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_bounds_of_a_difference_are_those_of_students_t_test(confidence: float) -> None:
    differences = [0.01, -0.02, 0.04, 0.015]
    figure = worse_by(differences, confidence)
    assert figure.value == pytest.approx(statistics.fmean(differences), rel=1e-14)
    # a bound is where a one-sided test against it has the p value of what is left to be sure
    _, above = stats.ttest_1samp(differences, figure.upper, alternative="less")
    _, below = stats.ttest_1samp(differences, figure.lower, alternative="greater")
    assert above == pytest.approx(1 - confidence, rel=1e-9)
    assert below == pytest.approx(1 - confidence, rel=1e-9)


PLAN = made_plan(Made())


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.mark.parametrize(
    ("arm", "verdict"),
    [
        ((1.0, 2.0, 3.0), "no worse"),
        ((0.5, 1.5, 2.5), "no worse"),
        # the margin is 0.02: at it is within it, above it is not
        ((1.02, 2.02, 3.02), "no worse"),
        ((1.021, 2.021, 3.021), "worse"),
        ((1.01, 2.0, 3.01), "no worse"),
        ((1.03, 2.0, 3.0), "undecided"),
        # surely worse, but not surely by more than the margin
        ((1.03, 2.025, 3.02), "undecided"),
        ((1.5, 2.6, 3.4), "worse"),
        ((1.9, 2.0, 3.0), "undecided"),
    ],
)
@pytest.mark.parametrize("lower_is_better", [True, False])
def test_quality_is_judged_by_where_the_margin_lies(
    arm: tuple[float, ...], verdict: str, lower_is_better: bool
) -> None:
    sign = 1 if lower_is_better else -1
    theirs, ours = by_seed(sign * 1.0, sign * 2.0, sign * 3.0), by_seed(*(sign * value for value in arm))
    # so that 0.02 is not a matter of rounding
    plan = Plan(PLAN.task, PLAN.arms, PLAN.baseline, margin=0.01 + 1e-12)
    worse, judged = judge_quality(theirs, ours, plan, lower_is_better=lower_is_better)
    assert judged == verdict
    assert worse is not None
    assert worse.value == pytest.approx(statistics.fmean(arm) - 2, abs=1e-12)


def test_equal_qualities_of_zero_are_no_worse() -> None:
    zeros = by_seed(0.0, 0.0, 0.0)
    assert judge_quality(zeros, zeros, PLAN, lower_is_better=True) == (Spread(0.0, 0.0, 0.0), "no worse")


@pytest.mark.parametrize(
    ("baseline", "arm", "has_difference", "verdict"),
    [
        (by_seed(1, 2), by_seed(1, 2, 3), True, "not tested"),
        (by_seed(1, 2, 3), {0: 1.0, 2: 3.0}, True, "not tested"),
        (by_seed(1, 2, 3), {1: 2.0}, False, "not tested"),
        (by_seed(1, 2, 3), {}, False, "not tested"),
        ({}, by_seed(1, 2, 3), False, "not tested"),
        (by_seed(1, math.nan, 3), by_seed(1, 2, 3), False, "not tested"),
        (by_seed(1, 2, 3), by_seed(1, math.nan, 3), False, "worse"),
        (by_seed(1, 2, 3), {2: math.inf}, False, "worse"),
        ({}, {0: math.nan}, False, "not tested"),
    ],
)
def test_what_is_missing_is_not_tested_and_what_is_not_finite_is_worse(
    baseline: dict[int, float], arm: dict[int, float], has_difference: bool, verdict: str
) -> None:
    worse, judged = judge_quality(baseline, arm, PLAN, lower_is_better=True)
    assert (worse is not None, judged) == (has_difference, verdict)


def test_one_seed_is_not_tested() -> None:
    plan = made_plan(Made(seeds=(0,)))
    assert judge_quality({0: 1.0}, {0: 9.0}, plan, lower_is_better=True) == (None, "not tested")


def test_an_arm_just_beyond_the_margin_is_seldom_called_no_worse() -> None:
    trials, draws, passed = 3000, random.Random(1), 0
    for _ in range(trials):
        ours = by_seed(*(1.01 + draws.gauss(0, 0.005) for _ in range(3)))
        passed += judge_quality(by_seed(1, 1, 1), ours, PLAN, lower_is_better=True)[1] == "no worse"
    # at the margin itself the error is 5 %; false alarms of both sides are below 1e-9
    assert stats.binom.ppf(5e-10, trials, 0.05) <= passed <= stats.binom.isf(5e-10, trials, 0.05)
