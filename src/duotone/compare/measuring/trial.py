"""A few steps of an arm, alone: what a step takes, what memory it needs, and whether its evaluation is repeatable.

Memory comes first, over the steps alone: whatever is measured after it needs memory of its own.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

import duotone.torch as dt
from duotone.compare.arms.build import versions
from duotone.compare.arms.catalogue import Arm
from duotone.compare.failures import WorkerFailed
from duotone.compare.measuring.arm_trainer import ArmTrainer
from duotone.compare.measuring.footprint import Footprint
from duotone.compare.measuring.turn import Step
from duotone.compare.records import Trial, median_phases
from duotone.torch.watching import saved_for_backward

WARMUP_STEPS = 2
# steps are timed until there are so many and they took so long, ...
_STEPS, _SECONDS = 8, 2.0
# ... but no more than so many, or twice as many if they are quick; and fewer if all this takes too long
_MOST_STEPS, _QUICK_SECONDS, _PATIENCE_SECONDS = 30, 0.02, 30.0
_AT_ONCE = 4


def try_arm(
    trainer: ArmTrainer,
    arm: Arm,
    footprint: Footprint,
    profile_path: Path | None = None,
    limit_seconds: float = math.inf,
) -> Trial:
    """Train a little and measure; a failure is the trial's.

    Args:
        trainer: fresh.
        arm: whose trainer it is.
        footprint: begun before the trainer was.
        profile_path: where a trace of one more step goes, or None.
        limit_seconds: an arm whose steps take longer will not be trained, so two steps tell enough of it.

    Raises:
        TaskError: the task is at fault, whichever arm trains it.
        WorkerFailed: a step failed.
    """
    steps = timed_steps(trainer, footprint, limit_seconds)
    peak = footprint.peak_bytes()
    roles = dt.memory(trainer.stepper.model, trainer.stepper.optimizer)
    saved = _saved_bytes(trainer)
    evaluation, evaluate_seconds = _timed_evaluation(trainer)
    trial = Trial(
        arm.name,
        parameters=roles.parameters,
        phases=median_phases([step.phases for step in steps]),
        units_per_step=sum(step.units for step in steps) / len(steps),
        memory={
            name: getattr(roles, f"{name}_bytes") for name in ("weights", "tails", "gradients", "moments", "other")
        },
        saved_bytes=saved,
        peak_memory_bytes=peak,
        evaluate_seconds=evaluate_seconds,
        evaluation=evaluation,
        is_deterministic=_same(evaluation, trainer.evaluate()),
        versions=versions(arm),
        compile_seconds=trainer.compilation.seconds,
    )
    if profile_path is not None:
        _profile(trainer, profile_path)
    return trial


def timed_steps(trainer: ArmTrainer, footprint: Footprint, limit_seconds: float = math.inf) -> Sequence[Step]:
    """Warm up, and return enough steps after it for stable medians; the peak of memory is that of these.

    Raises:
        WorkerFailed: a step failed.
    """
    warm = _take(trainer, WARMUP_STEPS)
    if warm[-1].phases.step > limit_seconds:
        # one step may have met with something else that the machine did
        quicker = min(warm[-1], *_take(trainer, 1), key=lambda step: step.phases.step)
        if quicker.phases.step > limit_seconds:
            return [quicker]
    # what is compiled for the task's own shapes is no part of a step
    footprint.begin_again()
    steps: list[Step] = []
    for seconds, some in _chunks(trainer):
        steps += some
        most = 2 * _MOST_STEPS if seconds / len(steps) < _QUICK_SECONDS else _MOST_STEPS
        is_stable = len(steps) >= _STEPS and seconds >= _SECONDS
        if is_stable or len(steps) >= most or seconds >= _PATIENCE_SECONDS:
            break
    return steps


def _chunks(trainer: ArmTrainer) -> Iterator[tuple[float, Sequence[Step]]]:
    seconds = 0.0
    while True:
        steps = _take(trainer, _AT_ONCE)
        seconds += sum(step.phases.step for step in steps)
        yield seconds, steps


def _take(trainer: ArmTrainer, steps: int) -> Sequence[Step]:
    turn = trainer.take(steps)
    if turn.failure is not None:
        raise WorkerFailed(turn.failure)
    return turn.steps


def _saved_bytes(trainer: ArmTrainer) -> dict[str, int]:
    """Count what autograd keeps of a forward pass; the graph is dropped without a backward pass."""
    with saved_for_backward(trainer.stepper.model.parameters()) as saved:
        trainer.stepper.forward(trainer.batch())
    return dict(saved.activation_bytes)


def _timed_evaluation(trainer: ArmTrainer) -> tuple[dict[str, float], float]:
    started = time.perf_counter()
    return trainer.evaluate(), time.perf_counter() - started


def _same(one: dict[str, float], other: dict[str, float]) -> bool:
    # a NaN that comes again is the same figure
    return {name: repr(value) for name, value in one.items()} == {name: repr(value) for name, value in other.items()}


def _profile(trainer: ArmTrainer, path: Path) -> None:
    activities = [ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        _take(trainer, 1)
    profiled.export_chrome_trace(str(path))
