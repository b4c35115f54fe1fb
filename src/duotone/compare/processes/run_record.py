"""The record of a run, made of its turns: losses averaged to few points, scales as changes, skips as step numbers."""

import math
from collections.abc import Mapping, Sequence

from duotone.compare.measuring.turn import Turn
from duotone.compare.records import Failure, Run

_POINTS = 400


def run_record(
    arm: str,
    seed: int,
    turns: Sequence[Turn],
    *,
    failure: Failure | None = None,
    evaluation: Mapping[str, float] | None = None,
    notes: tuple[str, ...] = (),
) -> Run:
    """Return the record of a run that has ended."""
    steps = [step for turn in turns for step in turn.steps]
    return Run(
        arm,
        seed,
        steps=len(steps),
        failure=failure,
        turns=tuple(turn.phases for turn in turns if turn.steps),
        losses=thinned([step.loss for step in steps]),
        loss_scales=changes([step.loss_scale for step in steps]),
        skipped=tuple(number for number, step in enumerate(steps, 1) if step.skipped),
        evaluation=evaluation or {},
        seconds=sum(turn.seconds for turn in turns),
        notes=notes,
    )


def not_finite(turns: Sequence[Turn]) -> Failure | None:
    """Return the failure of a run whose last turn has a mean loss that is Inf or NaN, or None.

    The step that it names is the first with such a loss.
    """
    if math.isfinite(turns[-1].loss):
        return None
    losses = [step.loss for turn in turns for step in turn.steps]
    first = next((number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)), len(losses))
    return Failure("not finite", f"the loss became {losses[first - 1]} by step {first}")


def thinned(losses: Sequence[float], points: int = _POINTS) -> tuple[tuple[int, float], ...]:
    """Return the losses of steps 1, 2, ... as at most `points` pairs of a step and the mean since the pair before.

    Steps whose loss is Inf or NaN have no part in a mean, and no pair of their own.

    >>> thinned([4.0, 2.0, 3.0, 1.0, 5.0], points=3)
    ((2, 3.0), (4, 2.0), (5, 5.0))
    """
    width = max(1, math.ceil(len(losses) / points))
    pairs = []
    for start in range(0, len(losses), width):
        part = [loss for loss in losses[start : start + width] if math.isfinite(loss)]
        if part:
            pairs.append((min(start + width, len(losses)), sum(part) / len(part)))
    return tuple(pairs)


def changes(scales: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Return the loss scales of steps 1, 2, ... as pairs of a step and the scale from there on.

    >>> changes([8.0, 8.0, 4.0, 4.0, 8.0])
    ((1, 8.0), (3, 4.0), (5, 8.0))
    """
    before = [None, *scales]
    return tuple((step, scale) for step, scale in enumerate(scales, 1) if scale != before[step - 1])
