"""Steps, turns and company follow from the trials."""

import pytest

from duotone.compare.arms.catalogue import find_arms
from duotone.compare.measuring.device_state import DeviceState
from duotone.compare.pacing import pace_of, round_down, too_slow
from duotone.compare.plan import Plan
from duotone.compare.records import Phases, Trial
from duotone.compare.subject import Subject

SUBJECT = Subject("tiny", "loss", True, "samples", 49, {}, {}, task_steps=1400, task_warmup_steps=100, micro_batch=8)
ROOMY = DeviceState("cpu", None, 10**12)


def plan_of(**changes: object) -> Plan:
    return Plan("tiny.py", find_arms("fp32,bf16"), baseline="fp32", **changes)


def trials_of(fp32: float, bf16: float, peak: int | None = 10**9) -> list[Trial]:
    return [
        Trial(arm, phases=Phases(step, 0, 0, 0), peak_memory_bytes=peak, start_seconds=9.0, evaluate_seconds=1.0)
        for arm, step in (("fp32", fp32), ("bf16", bf16))
    ]


def test_steps_fill_the_minutes_that_trials_and_starts_leave() -> None:
    # 480 s, less 60 s of trials and 20 s per seed, over 3 seeds of 0.25 s a step
    pace = pace_of(plan_of(), SUBJECT, trials_of(0.2, 0.05), ROOMY, seconds_gone=60.0)
    assert (pace.steps, pace.warmup_steps) == (480, 100)


def test_steps_are_at_most_the_tasks_own_and_at_least_twenty() -> None:
    assert pace_of(plan_of(), SUBJECT, trials_of(1e-4, 1e-4), ROOMY).steps == 1400
    assert pace_of(plan_of(minutes=0.01), SUBJECT, trials_of(1.0, 1.0), ROOMY).steps == 20
    short = Subject("tiny", "loss", True, "samples", 49, {}, {}, task_steps=7, task_warmup_steps=0, micro_batch=8)
    assert pace_of(plan_of(), short, trials_of(1.0, 1.0), ROOMY).steps == 7


def test_steps_that_were_asked_for_are_taken() -> None:
    pace = pace_of(plan_of(steps=2800, minutes=0.01), SUBJECT, trials_of(0.1, 0.1), ROOMY)
    assert (pace.steps, pace.warmup_steps) == (2800, 100)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(70, 17), (399, 99), (400, 100), (1000, 100), (2, 0)])
def test_a_warmup_is_the_tasks_own_or_a_quarter(steps: int, warmup_steps: int) -> None:
    assert pace_of(plan_of(steps=steps), SUBJECT, trials_of(0.1, 0.1), ROOMY).warmup_steps == warmup_steps


def test_a_warmup_that_was_asked_for_is_kept() -> None:
    assert pace_of(plan_of(steps=70, settings={"warmup_steps": 30}), SUBJECT, trials_of(1, 1), ROOMY).warmup_steps == 30
    assert pace_of(plan_of(steps=20, settings={"warmup_steps": 30}), SUBJECT, trials_of(1, 1), ROOMY).warmup_steps == 20


@pytest.mark.parametrize(
    ("steps", "baseline_seconds", "turn_steps"),
    [(1000, 0.1, 15), (1000, 0.001, 100), (1000, 5.0, 3), (20, 0.1, 3), (2, 0.1, 2)],
)
def test_turns_are_short_and_many(steps: int, baseline_seconds: float, turn_steps: int) -> None:
    pace = pace_of(plan_of(steps=steps), SUBJECT, trials_of(baseline_seconds, 0.01), ROOMY)
    assert pace.turn_steps == turn_steps


def test_without_the_baseline_the_others_are_run() -> None:
    assert pace_of(plan_of(steps=1000), SUBJECT, trials_of(9.0, 0.1)[1:], ROOMY).turn_steps == 15


@pytest.mark.parametrize(
    ("device_state", "together"),
    [
        (DeviceState("cpu", None, 3_500_000_001), True),
        (DeviceState("cpu", None, 3_499_000_000), False),
        (DeviceState("cuda", "H100", 3_600_000_000), False),
        (DeviceState("cuda", "H100", 3_750_000_001), True),
        (DeviceState("cpu", None, None), False),
    ],
)
def test_arms_run_together_if_they_fit(device_state: DeviceState, together: bool) -> None:
    # two peaks of 1 GB with 0.4 GB each on a CPU, 0.5 GB on a GPU, in four fifths of what is free
    assert pace_of(plan_of(), SUBJECT, trials_of(0.1, 0.1), device_state).together is together


def test_arms_of_unknown_size_do_not_run_together_but_one_alone_may() -> None:
    trials = trials_of(0.1, 0.1, peak=None)
    assert not pace_of(plan_of(), SUBJECT, trials, ROOMY).together
    assert pace_of(plan_of(), SUBJECT, trials[:1], ROOMY).together


def test_too_slow_is_judged_by_the_baseline() -> None:
    fp32, bf16 = trials_of(0.1, 0.99)
    assert too_slow(bf16, fp32, 10.0) is None
    failure = too_slow(trials_of(0.1, 1.23)[1], fp32, 10.0)
    assert failure is not None
    assert failure.kind == "too slow"
    assert failure.reason == "a step takes 12.3 times the baseline's; --max-slowdown 20 trains it all the same"
    assert too_slow(trials_of(0.1, 1.23)[1], None, 10.0) is None
    assert too_slow(fp32, fp32, 10.0) is None


@pytest.mark.parametrize(("steps", "rounded"), [(0.4, 0), (7.9, 7), (99.9, 99), (100, 100), (1999, 1900), (-5, -5)])
def test_rounding_keeps_two_digits(steps: float, rounded: int) -> None:
    assert round_down(steps) == rounded
