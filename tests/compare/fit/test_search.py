"""The search for the largest micro-batch that fits: its answer, what it costs, and how far beyond the limit it goes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.compare.fit.search import FIRST_GROWTH, GROWTH, NOISE, TOLERANCE, LargestFit, largest_fitting
from duotone.errors import CompareError

MOST = 2**20
LIMIT = 2_000_000_000
# of any cost that grows; those of models take at most `FEW`
MANY, FEW = 40, 10


class Meter:
    """Measures a cost in bytes, and checks that the search asks for nothing in vain."""

    def __init__(self, cost, limit=LIMIT):
        self.cost = cost
        self.limit = limit
        self.asked = []

    def __call__(self, samples):
        assert isinstance(samples, int)
        assert 1 <= samples <= MOST
        peak = self.cost(samples)
        outcomes = [(other, self.fits(other)) for other in self.asked]
        assert all(other < samples for other, fits in outcomes if fits)
        assert all(other > samples for other, fits in outcomes if not fits)
        self.asked.append(samples)
        return peak

    def fits(self, samples):
        peak = self.cost(samples)
        return peak is not None and peak <= self.limit


def search(cost, start=8, limit=LIMIT, most=MOST):
    """Search, and check that the answer keeps the rule by which the search ends."""
    meter = Meter(cost, limit)
    fit = largest_fitting(meter, start, limit, most=most)
    assert fit.tried == tuple((samples, cost(samples)) for samples in meter.asked)
    if fit.samples:
        assert (fit.samples, fit.peak_bytes) in fit.tried
        assert meter.fits(fit.samples)
    else:
        assert fit.peak_bytes is None
    above = [samples for samples in meter.asked if samples > fit.samples]
    assert (fit.remark is not None) == (fit.samples == most)
    if fit.samples < most:
        assert min(above) - fit.samples <= max(1, TOLERANCE * fit.samples)
        assert not meter.fits(min(above))
    return fit


def model_cost(overhead, largest):
    """What a model takes that fits into the limit with `largest` samples, `overhead` of the limit apart."""
    return lambda samples: round(LIMIT * (overhead + (1 - overhead) * samples / largest))


@settings(deadline=None)
@given(overhead=st.floats(0, 0.7), start=st.integers(1, 64), ratio=st.floats(1 / 64, 2000))
def test_a_model_takes_few_measurements_and_little_above_the_limit(overhead, start, ratio):
    largest = max(1, round(start * ratio))
    cost = model_cost(overhead, largest)
    fit = search(cost, start)
    assert fit.samples <= largest < fit.samples + 1 + TOLERANCE * fit.samples
    assert len(fit.tried) <= FEW
    # of a few samples, one more is much
    beyond = [peak for samples, peak in fit.tried if samples > start] if fit.samples > 10 else []
    assert all(peak is not None and peak < 1.25 * LIMIT for peak in beyond)


@settings(deadline=None)
@given(overhead=st.floats(0, 0.7), ratio=st.floats(1 / 64, 2000), seed=st.integers(0, 2**32))
def test_noise_costs_little(overhead, ratio, seed):
    largest = max(1, round(32 * ratio))
    cost = model_cost(overhead, largest)

    def noisy(samples):
        return round(cost(samples) * random.Random(seed + samples).uniform(1 - NOISE, 1 + NOISE))

    fit = search(noisy, 32)
    # noise of the whole, as samples
    doubtful = largest * NOISE / (1 - overhead)
    assert abs(fit.samples - largest) <= 2 * doubtful + 1 + TOLERANCE * largest
    assert len(fit.tried) <= FEW + 2


@settings(deadline=None)
@given(
    slope=st.floats(1, LIMIT),
    overhead=st.floats(0, 2 * LIMIT),
    leaps=st.lists(st.tuples(st.integers(1, MOST), st.integers(1, LIMIT)), max_size=5),
    memory_ends=st.integers(1, MOST) | st.none(),
    start=st.integers(1, 1000),
)
def test_any_cost_that_grows_ends_in_the_answer(slope, overhead, leaps, memory_ends, start):
    def cost(samples):
        if memory_ends is not None and samples >= memory_ends:
            return None
        return round(overhead + slope * samples) + sum(size for place, size in leaps if samples >= place)

    assert len(search(cost, start).tried) <= MANY


def test_a_search_takes_the_measurements_that_a_person_would():
    fit = search(lambda samples: 30_000_000 + 700_000 * samples, start=32)
    # up by as much as one measurement allows, and two, then by the line, and one more to see that no more fits
    assert [samples for samples, _ in fit.tried] == [32, 128, 1024, 2765, 2847]
    assert (fit.samples, fit.peak_bytes) == (2765, 1_965_500_000)


@pytest.mark.parametrize(
    ("cost", "measurements"),
    [
        # memory leaps far beyond the limit, and the line says that hardly more fits than before
        (lambda samples: samples if samples < 777 else 10**13, 18),
        # nearly all is there before the first sample, and noise could be all that grows
        (lambda samples: round(0.99 * LIMIT) + 30 * samples, 30),
        # memory runs out where the line promises much more
        (lambda samples: 1000 * samples if samples < 5000 else None, 13),
    ],
)
def test_a_line_that_misleads_is_left_before_long(cost, measurements):
    assert len(search(cost, start=8).tried) <= measurements


def test_nothing_fits():
    for cost in (lambda _: LIMIT + 1, lambda _: None):
        fit = search(cost)
        assert (fit.samples, fit.peak_bytes) == (0, None)
        assert fit.tried[-1][0] == 1
    assert search(lambda samples: LIMIT * samples).samples == 1


def test_a_peak_of_exactly_the_limit_fits():
    assert search(lambda samples: LIMIT - 10 + samples, start=10).samples == 10
    assert search(lambda samples: LIMIT - 10 + samples, start=11).samples == 10


def test_an_upper_bound_that_fits_is_said():
    fit = search(lambda samples: samples, start=32)
    assert fit.samples == MOST
    assert fit.remark == "1,048,576 samples fit; more were not tried"
    assert search(lambda _: 1, start=50, most=7) == LargestFit(7, 1, ((7, 1),), "7 samples fit; more were not tried")


def test_small_batches_that_take_nothing_are_not_trusted_far():
    # all of it hides in memory that the process holds, up to a batch of 100
    fit = search(lambda samples: max(0, samples - 100) * 10**7, start=8)
    sizes = [samples for samples, _ in fit.tried]
    assert sizes[:3] == [8, 8 * FIRST_GROWTH, 8 * FIRST_GROWTH * GROWTH]
    assert 290 <= fit.samples <= 300


def test_an_error_while_measuring_is_not_taken_for_a_batch_that_does_not_fit():
    def broken(samples):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        largest_fitting(broken, 8, LIMIT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0}, "start is 0; it must be at least 1"),
        ({"limit_bytes": 0}, "limit_bytes is 0"),
        ({"most": 0}, "most is 0"),
    ],
)
def test_numbers_below_one_are_refused(arguments, message):
    with pytest.raises(CompareError, match=message):
        largest_fitting(lambda _: 1, **{"start": 8, "limit_bytes": 1, **arguments})
