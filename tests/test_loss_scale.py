"""Loss scaling: the transition against torch.amp's, the same in every array library, and its bounds."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotone.errors import LossScaleError
from duotone.loss_scale import LossScale, LossScaleState, init_state, select, update

STEPS = st.lists(st.booleans(), max_size=60)


@st.composite
def any_settings(draw):
    """Draw any dynamic, static or one-sided settings; windows are short so that sequences fill them."""
    low, start, high = sorted(draw(st.lists(st.integers(-126, 127), min_size=3, max_size=3)))
    return LossScale(
        init_scale=2.0**start,
        growth_factor=2.0 ** draw(st.integers(0, 8)),
        backoff_factor=2.0 ** -draw(st.integers(0, 8)),
        growth_interval=draw(st.integers(1, 5)),
        hysteresis=draw(st.integers(1, 4)),
        min_scale=2.0**low,
        max_scale=2.0**high,
    )


def settled(loss_scale):
    """Return the state before the first step of a scale that is not searched for."""
    return replace(init_state(loss_scale), search=0)


def trajectory(loss_scale, steps, start=init_state):
    """Return the states after each step, in Python numbers."""
    states = [start(loss_scale)]
    for found_inf in steps:
        states.append(update(loss_scale, states[-1], found_inf))
    return states[1:]


@settings(deadline=None)
@given(any_settings(), STEPS)
def test_the_scale_is_a_power_of_two_within_its_bounds(loss_scale, steps):
    for state in trajectory(loss_scale, steps):
        assert math.frexp(state.scale)[0] == 0.5
        assert loss_scale.min_scale <= state.scale <= loss_scale.max_scale
        assert 0 <= state.growth_tracker < loss_scale.growth_interval
        assert 0 <= state.hysteresis_tracker < loss_scale.hysteresis


@settings(deadline=None)
@given(any_settings(), STEPS)
def test_skipped_steps_are_counted(loss_scale, steps):
    for index, state in enumerate(trajectory(loss_scale, steps)):
        seen = steps[: index + 1]
        assert state.skipped == sum(seen)
        assert state.skipped_in_a_row == seen[::-1].index(False) if False in seen else len(seen)


@settings(deadline=None)
@given(STEPS, st.integers(1, 4), st.sampled_from([2.0, 4.0]), st.sampled_from([0.5, 0.25]))
def test_at_hysteresis_one_the_trajectory_is_torch_amp_s(steps, interval, growth, backoff):
    # 60 steps by a factor of 4 stay inside bounds this wide; torch has none
    loss_scale = LossScale(2.0**4, growth, backoff, interval, min_scale=2.0**-126, max_scale=2.0**127)
    scale, tracker = torch.tensor(2.0**4), torch.tensor(0, dtype=torch.int32)
    for found_inf, state in zip(steps, trajectory(loss_scale, steps, settled), strict=True):
        torch.ops.aten._amp_update_scale_(scale, tracker, torch.tensor(float(found_inf)), growth, backoff, interval)
        assert (state.scale, state.growth_tracker) == (scale.item(), tracker.item())


@settings(deadline=None)
@given(any_settings(), st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=30))
def test_numpy_and_torch_follow_python_for_many_scales_at_once(loss_scale, rows):
    expected = [trajectory(loss_scale, column) for column in zip(*rows, strict=True)]
    libraries = [
        (np.array, np.where, np.float32, np.int32),
        (torch.tensor, torch.where, torch.float32, torch.int32),
    ]
    for array, where, float32, int32 in libraries:
        start = asdict(init_state(loss_scale))
        kinds = {name: float32 if name == "scale" else int32 for name in start}
        state = LossScaleState(**{name: array([start[name]] * 3, dtype=kind) for name, kind in kinds.items()})
        for index, row in enumerate(rows):
            state = update(loss_scale, state, array(row), where=where)
            for name, leaf in vars(state).items():
                assert leaf.dtype == kinds[name]
                assert leaf.tolist() == [getattr(column[index], name) for column in expected]


@pytest.mark.parametrize("flag", [torch.tensor(True), torch.tensor(1.0), torch.tensor(3), torch.tensor(math.nan)])
def test_every_kind_of_flag_is_an_overflow_in_torch_scalars(flag):
    state = LossScaleState(torch.tensor(8.0), *(torch.tensor(0, dtype=torch.int32) for _ in range(4)))
    state = update(LossScale(), state, flag, where=torch.where)
    assert (state.scale.item(), state.skipped.item()) == (4.0, 1)
    assert (state.scale.dtype, state.skipped.dtype, state.scale.shape) == (torch.float32, torch.int32, ())


# o is an overflow, . a clean step; the scale starts at 2**8, the window is 3, the ceiling 2**9
@pytest.mark.parametrize(
    ("hysteresis", "steps", "powers"),
    [
        (1, "o.o.o", [7, 7, 6, 6, 5]),
        (1, "..o...", [8, 8, 7, 7, 7, 8]),
        (1, "......", [8, 8, 9, 9, 9, 9]),
        (2, "ooo", [8, 7, 6]),
        (2, "o..o", [8, 8, 8, 7]),
        (2, "oo...oo", [8, 7, 7, 7, 8, 8, 7]),
        (3, "oooo", [8, 8, 7, 6]),
        # at the ceiling nothing grows, and still a clean window restores the tolerance
        (2, "...oo...o...o", [8, 8, 9, 9, 8, 8, 8, 9, 9, 9, 9, 9, 9]),
        # a tolerated overflow ends the window as any other does
        (2, "..o...", [8, 8, 8, 8, 8, 9]),
    ],
)
def test_hysteresis(hysteresis, steps, powers):
    loss_scale = LossScale(2.0**8, growth_interval=3, hysteresis=hysteresis, max_scale=2.0**9)
    states = trajectory(loss_scale, [step == "o" for step in steps], settled)
    assert [math.log2(state.scale) for state in states] == powers


@settings(deadline=None)
@given(any_settings(), STEPS)
def test_after_a_clean_window_the_tolerance_is_as_new(loss_scale, steps):
    *_, state = trajectory(loss_scale, [*steps, *[False] * loss_scale.growth_interval], settled)
    fresh = init_state(loss_scale)
    assert state.hysteresis_tracker == fresh.hysteresis_tracker
    for _ in range(loss_scale.hysteresis - 1):
        tolerated = update(loss_scale, state, True)
        assert tolerated.scale == state.scale
        state = tolerated
    shrunk = max(state.scale * loss_scale.backoff_factor, loss_scale.min_scale)
    assert update(loss_scale, state, True).scale == shrunk


# how to make a 0-d array of a dtype, its `where`, how to read it, and the dtypes of a state
LIBRARIES = {
    "python": (lambda value, dtype: value, select, lambda value: value, None, None),
    "numpy": (np.asarray, np.where, lambda value: value.item(), np.float32, np.int32),
    "torch": (
        lambda value, dtype: torch.tensor(value, dtype=dtype),
        torch.where,
        lambda value: value.item(),
        torch.float32,
        torch.int32,
    ),
}


def step_in(library, loss_scale, state, found_inf, loss_is_finite):
    """Return the state after a step that was taken in a library, in Python numbers."""
    array, where, read, float32, int32 = LIBRARIES[library]
    kinds = {name: float32 if name == "scale" else int32 for name in vars(state)}
    before = LossScaleState(**{name: array(leaf, kinds[name]) for name, leaf in vars(state).items()})
    flags = array(found_inf, None), array(loss_is_finite, None)
    after = update(loss_scale, before, flags[0], loss_is_finite=flags[1], where=where)
    assert all(getattr(leaf, "dtype", None) == kinds[name] for name, leaf in vars(after).items())
    return LossScaleState(**{name: read(leaf) for name, leaf in vars(after).items()})


# a loss that is not finite: scale, trackers and counts before and after
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("before", "found_inf", "after"),
    [
        # an overflow then says nothing, in or out of tolerance, at the floor, and at the end of a window
        ((8.0, 0, 1, 0, 0), True, (8.0, 0, 1, 1, 1)),
        ((8.0, 1, 0, 3, 2), True, (8.0, 1, 0, 4, 3)),
        ((1.0, 2, 0, 0, 0), True, (1.0, 2, 0, 1, 1)),
        # finite gradients of such a loss are a clean step like any other, which may fill the window
        ((8.0, 0, 0, 5, 5), False, (8.0, 1, 0, 5, 0)),
        ((8.0, 2, 0, 5, 0), False, (16.0, 0, 1, 5, 0)),
        # nor does an overflow end a search, or begin one
        ((8.0, 0, 0, 0, 0, 2), True, (8.0, 0, 0, 1, 1, 2)),
        ((4.0, 0, 0, 1, 0, 1), True, (4.0, 0, 0, 2, 1, 1)),
    ],
)
def test_a_loss_that_is_not_finite_leaves_the_scale_alone(library, before, found_inf, after):
    loss_scale = LossScale(8.0, growth_interval=3, hysteresis=2)
    assert step_in(library, loss_scale, LossScaleState(*before), found_inf, False) == LossScaleState(*after)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("found_inf", [True, False])
@pytest.mark.parametrize("loss_scale", [LossScale.none(), LossScale.static(8.0), LossScale(8.0, growth_interval=1)])
def test_a_finite_loss_is_what_is_taken_for_granted(library, found_inf, loss_scale):
    state = init_state(loss_scale)
    assert step_in(library, loss_scale, state, found_inf, True) == update(loss_scale, state, found_inf)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("loss_scale", [LossScale.none(), LossScale.static(8.0)])
def test_a_scale_that_stands_still_counts_whatever_the_loss_is(library, loss_scale):
    state = LossScaleState(loss_scale.init_scale, 0, 0, 2, 1)
    for found_inf, counts in ((True, (3, 2)), (False, (2, 0))):
        after = step_in(library, loss_scale, state, found_inf, False)
        assert (after.scale, after.skipped, after.skipped_in_a_row) == (loss_scale.init_scale, *counts)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("yes", "no"), [(True, False), (1, 0), (1.0, 0.0)])
def test_whether_a_loss_is_finite_is_said_by_any_kind_of_number(library, yes, no):
    state = settled(LossScale())
    assert step_in(library, LossScale(), state, True, no).scale == 2.0**16
    assert step_in(library, LossScale(), state, True, yes).scale == 2.0**15


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_each_of_many_scales_has_its_own_loss(library):
    array, where, _, float32, int32 = LIBRARIES[library]
    state = LossScaleState(array([8.0] * 4, float32), *(array([0] * 4, int32) for _ in range(4)))
    found_inf, finite = array([True, True, False, False], None), array([True, False, True, False], None)
    after = update(LossScale(), state, found_inf, loss_is_finite=finite, where=where)
    assert after.scale.tolist() == [4.0, 8.0, 8.0, 8.0]
    assert after.growth_tracker.tolist() == [0, 0, 1, 1]
    assert after.skipped.tolist() == [1, 1, 0, 0]


def found(start, right, **changes):
    """Return the states of a run whose gradients overflow at scales above 2**right, from a scale of 2**start."""
    loss_scale = LossScale(2.0**start, max_scale=2.0**127, **changes)
    states = [init_state(loss_scale)]
    # to the end of the second look
    while len(states) < 81 or states[-1].search:
        states.append(update(loss_scale, states[-1], states[-1].scale > 2.0**right))
    return states


@pytest.mark.parametrize("floor", [0, 4])
def test_from_any_start_to_any_scale_at_most_two_steps_are_skipped(floor):
    for start in range(floor, 128):
        for right in (*range(floor, start, 5), *range(max(floor, start - 3), start + 3)):
            states = found(start, right, min_scale=2.0**floor)
            first_clean = next(state for state in states[1:] if state.skipped_in_a_row == 0)
            assert first_clean.skipped == (right < start)
            # two powers for each clean step, and one at the end
            steps = next(number for number, state in enumerate(states) if state.search in (0, 3))
            assert steps <= 3 + (start - floor + 1) // 2
            # the second is what ends the search, where the scale that overflowed first is not next to the right one
            assert states[min(steps + 60, len(states) - 1)].skipped <= 2
            # and the third the second look
            assert states[-1].skipped <= 3
            for state in (states[steps], states[-1]):
                assert min(right, start) - 1 <= math.log2(state.scale) <= min(right, start)


def test_a_search_that_an_odd_step_ended_goes_on_later():
    # from a first overflow at 2**16 it climbs, and overflows at 4 though 2**12 is right
    loss_scale, state = LossScale(), init_state(LossScale())
    scales = []
    for step in range(90):
        state = update(loss_scale, state, step == 2 or state.scale > 2.0**12)
        scales.append(state.scale)
    assert scales[:4] == [1.0, 4.0, 1.0, 1.0]
    assert scales[66:74] == [4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 2.0**14, 2.0**12]
    assert (state.scale, state.search, state.skipped) == (2.0**12, 0, 3)


def test_an_overflow_before_the_second_look_is_as_any_other():
    scales = [state.scale for state in trajectory(LossScale(2.0**6), [step in (0, 4, 9) for step in range(100)])]
    assert scales[:11] == [1, 4, 16, 32, 8, 8, 8, 8, 8, 4, 4]
    assert set(scales[11:]) == {4}


def test_a_search_is_cut_short_by_nothing_but_its_end():
    loss_scale = LossScale(2.0**10, growth_interval=1, max_scale=2.0**12)
    # one batch overflows at any scale, another leaves nothing to say
    powers = [math.log2(state.scale) for state in trajectory(loss_scale, [step == "o" for step in "ooo......"])]
    assert powers == [0, 0, 0, 2, 4, 6, 8, 9, 10]
    # below 1 the search goes on to the floor
    loss_scale = LossScale(2.0**10, min_scale=2.0**-5)
    powers = [math.log2(state.scale) for state in trajectory(loss_scale, [step == "o" for step in "oooooo..o.."])]
    assert powers == [0, -2, -4, -5, -5, -5, -3, -1, -3, -3, -3]


@pytest.mark.parametrize("changes", [{"growth_factor": 1.0}, {"backoff_factor": 1.0}])
def test_a_scale_that_moves_one_way_is_not_searched_for(changes):
    assert init_state(LossScale(**changes)).search == 0


def test_an_overflow_that_is_tolerated_begins_no_search():
    states = trajectory(LossScale(2.0**10, hysteresis=2), [True, True, False, True, False])
    assert [(state.scale, state.search) for state in states] == [(1024, 2), (1, 1), (4, 1), (1, 3), (1, 3)]


def test_states_without_a_search_are_settled_and_stay_so():
    # as earlier versions saved them
    state = LossScaleState(8.0, 0, 0, 0, 0)
    for _ in range(3):
        state = update(LossScale(8.0), state, True)
    assert state == LossScaleState(1.0, 0, 0, 3, 3, 0)


def test_a_search_that_is_known_to_be_over_costs_arrays_nothing():
    settings, state = LossScale(8.0), LossScaleState(torch.tensor(8.0), *[torch.tensor(0)] * 4)
    for finite in (True, torch.tensor(True)):
        after = update(settings, state, torch.tensor(True), loss_is_finite=finite, where=torch.where)
        assert after.search == 0
        assert type(after.search) is int
        assert after.scale == 4.0


def test_a_window_shortened_on_resume_closes_at_the_next_clean_step():
    state = update(LossScale(growth_interval=3), LossScaleState(4.0, 10, 0, 0, 0), False)
    assert (state.scale, state.growth_tracker) == (8.0, 0)


@pytest.mark.parametrize("loss_scale", [LossScale.none(), LossScale.static(2.0**10), LossScale.static(2**32)])
@settings(deadline=None)
@given(STEPS)
def test_a_static_scale_stands_still_and_counts(loss_scale, steps):
    for state in trajectory(loss_scale, steps):
        assert state.scale == loss_scale.init_scale
    if steps:
        assert trajectory(loss_scale, steps)[-1].skipped == sum(steps)


def test_the_three_kinds():
    kinds = [LossScale.dynamic(growth_interval=5), LossScale.static(2), LossScale.none()]
    assert [kind.is_dynamic for kind in kinds] == [True, False, False]
    assert [kind.is_none for kind in kinds] == [False, False, True]
    assert kinds[0] == LossScale(growth_interval=5)
    assert not LossScale(init_scale=1).is_none
    assert LossScale(growth_factor=1).is_dynamic
    assert LossScale(backoff_factor=1).is_dynamic


def test_the_defaults_are_torch_amp_s():
    peer = torch.amp.GradScaler("cpu")
    assert LossScale().init_scale == peer._init_scale
    assert LossScale().growth_factor == peer.get_growth_factor()
    assert LossScale().backoff_factor == peer.get_backoff_factor()
    assert LossScale().growth_interval == peer.get_growth_interval()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("none", LossScale.none()),
        ("dynamic", LossScale()),
        (1024, LossScale.static(1024)),
        (1024.0, LossScale.static(1024)),
        ("1024", LossScale.static(1024)),
        (1, LossScale.none()),
    ],
)
def test_parsing(value, expected):
    assert LossScale.parse(value) == expected


@pytest.mark.parametrize("value", ["Dynamic", "1023", 3, 0, -1, "inf", None, 2.0**33, 10**400])
def test_what_cannot_be_parsed(value):
    with pytest.raises(LossScaleError) as caught:
        LossScale.parse(value)
    assert str(caught.value) == (
        f"loss scale {value!r} is not known; write none, dynamic, or a power of two from 1 to 2**32"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"init_scale": 3}, "init_scale must be a power of two such as 0.5 or 65536, not 3"),
        ({"init_scale": math.inf}, "init_scale must be a power of two such as 0.5 or 65536, not inf"),
        ({"init_scale": 10**400}, "init_scale must be a power of two such as 0.5 or 65536, not 1000"),
        ({"growth_factor": "x"}, "growth_factor must be a power of two such as 0.5 or 65536, not 'x'"),
        ({"backoff_factor": 0}, "backoff_factor must be a power of two such as 0.5 or 65536, not 0"),
        ({"min_scale": 2.0**-127}, "min_scale must be a power of two such as 0.5 or 65536, not 5.87"),
        ({"max_scale": 2.0**128}, "max_scale must be a power of two such as 0.5 or 65536, not 3.40"),
        ({"growth_factor": 0.5}, "growth_factor must be 1 or more, not 0.5"),
        ({"backoff_factor": 2}, "backoff_factor must be at most 1, not 2.0"),
        ({"growth_interval": 0}, "growth_interval must be a whole number from 1 on, not 0"),
        ({"growth_interval": 2000.0}, "growth_interval must be a whole number from 1 on, not 2000.0"),
        ({"hysteresis": True}, "hysteresis must be a whole number from 1 on, not True"),
        (
            {"init_scale": 0.5},
            "init_scale 0.5 must lie between min_scale 1.0 and max_scale 4294967296.0; move it or the bound",
        ),
        (
            {"max_scale": 2},
            "init_scale 65536.0 must lie between min_scale 1.0 and max_scale 2.0; move it or the bound",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, expected):
    with pytest.raises(LossScaleError) as caught:
        LossScale(**changes)
    assert str(caught.value).startswith(expected)


@settings(deadline=None)
@given(any_settings(), STEPS)
def test_settings_and_states_survive_dictionaries(loss_scale, steps):
    assert LossScale(**asdict(loss_scale)) == loss_scale
    for state in trajectory(loss_scale, steps):
        assert LossScaleState(**asdict(state)) == state
