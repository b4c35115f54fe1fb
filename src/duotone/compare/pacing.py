"""How many steps fit, and whether all arms fit into memory together: decided once, from the trials.

Steps are those of the task, or as many as the minutes allow at the trials' speed, what starting and evaluating takes
set aside. A turn lasts about a second and a half of the baseline: long beside a switch of arms, short beside the drift
of a machine.
"""

import math
from collections.abc import Collection
from statistics import median

from duotone.compare.measuring.device_state import DeviceState
from duotone.compare.plan import Pace, Plan
from duotone.compare.records import Failure, Trial
from duotone.compare.subject import Subject

_LEAST_STEPS = 20
_TURN_SECONDS, _LEAST_TURN_STEPS, _TURNS = 1.5, 3, 10
# a process before its model: the interpreter with torch and the kernels' compilers, or a context on a GPU
_PROCESS_BYTES = {"cpu": 400_000_000, "cuda": 500_000_000}
_USABLE = 0.8
# a run is at most one part in so many warm-up, unless its task's own is more
_WARMUP_SHARE = 4


def pace_of(
    plan: Plan,
    subject: Subject,
    trials: Collection[Trial],
    device_state: DeviceState,
    seconds_gone: float = 0.0,
) -> Pace:
    """Return the pace at which the arms of these trials are run.

    Args:
        plan: what is asked for.
        subject: what is trained.
        trials: of the arms that are run, without failures; at least one.
        device_state: where.
        seconds_gone: of the plan's minutes.
    """
    steps = plan.steps or _steps_in_time(plan, subject, trials, seconds_gone)
    warmup_steps = _warmup_steps(steps, subject)
    if "warmup_steps" in plan.settings:
        warmup_steps = min(int(plan.settings["warmup_steps"]), steps)
    times = {trial.arm: _step_seconds(trial) for trial in trials}
    baseline_seconds = times.get(plan.baseline, median(times.values()))
    turn_steps = min(round(_TURN_SECONDS / baseline_seconds), steps // _TURNS)
    return Pace(
        steps=steps,
        warmup_steps=warmup_steps,
        turn_steps=min(steps, max(_LEAST_TURN_STEPS, turn_steps)),
        together=len(trials) == 1 or _fit_together(trials, device_state),
    )


def too_slow(trial: Trial, baseline: Trial | None, max_slowdown: float) -> Failure | None:
    """Return why an arm is not run after its trial, or None if it is quick enough, or there is nothing to compare with.

    >>> from duotone.compare.records import Phases
    >>> quick, slow = (Trial(arm, phases=Phases(step, 0, 0, 0)) for arm, step in (("fp32", 0.1), ("fp16", 2.3)))
    >>> too_slow(slow, quick, 10.0).reason
    "a step takes 23 times the baseline's; --max-slowdown 30 trains it all the same"
    """
    if trial.phases is None or baseline is None or baseline.phases is None:
        return None
    times = _step_seconds(trial) / _step_seconds(baseline)
    if times <= max_slowdown:
        return None
    unit = 10 ** math.floor(math.log10(times))
    enough = math.ceil(times / unit) * unit
    return Failure(
        "too slow", f"a step takes {times:.3g} times the baseline's; --max-slowdown {enough:g} trains it all the same"
    )


def round_down(steps: float) -> int:
    """Return a number of steps with two significant digits.

    >>> round_down(1499.7), round_down(87.3)
    (1400, 87)
    """
    unit = 10 ** max(0, math.floor(math.log10(max(steps, 1))) - 1)
    return int(steps // unit * unit)


def _steps_in_time(plan: Plan, subject: Subject, trials: Collection[Trial], seconds_gone: float) -> int:
    overhead = sum(trial.start_seconds + trial.compile_seconds + trial.evaluate_seconds for trial in trials)
    left = plan.minutes * 60 - seconds_gone - len(plan.seeds) * overhead
    round_seconds = len(plan.seeds) * sum(_step_seconds(trial) for trial in trials)
    return min(subject.task_steps, max(_LEAST_STEPS, round_down(left / round_seconds)))


def _warmup_steps(steps: int, subject: Subject) -> int:
    """Return the task's own warm-up, or a quarter of fewer steps, or its share of them if that is more.

    What a warm-up has to wait for, an optimizer's moments for instance, takes as many steps in a short run as in a long
    one; in proportion, 100 steps of 1,400 would be 7 of 100, and precisions would part ways at a rate too high so soon.
    """
    own = subject.task_warmup_steps
    return min(own, max(steps // _WARMUP_SHARE, round(own * steps / subject.task_steps)))


def _fit_together(trials: Collection[Trial], device_state: DeviceState) -> bool:
    peaks = [trial.peak_memory_bytes for trial in trials]
    own = _PROCESS_BYTES.get(device_state.device)
    if device_state.free_bytes is None or own is None:
        return False
    needed = sum(math.inf if peak is None else peak + own for peak in peaks)
    return needed <= _USABLE * device_state.free_bytes


def _step_seconds(trial: Trial) -> float:
    # a clock that stood still must not divide by zero
    return max(trial.phases.step if trial.phases else 0.0, 1e-9)
