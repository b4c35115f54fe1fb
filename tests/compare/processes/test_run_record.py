"""Turns become a record: thinned losses, changes of scale, skipped steps."""

import math

import pytest

from duotone.compare.measuring.turn import Step, Turn
from duotone.compare.processes.run_record import changes, not_finite, run_record, thinned
from duotone.compare.records import Failure, Phases

PHASES = Phases(4.0, 1.0, 2.0, 1.0)


def turn_of(*losses: float) -> Turn:
    return Turn(tuple(Step(PHASES, 8.0, loss) for loss in losses), seconds=1.0)


@pytest.mark.parametrize("steps", [1, 399, 400, 401, 12_345])
def test_thinned_losses_are_few_end_at_the_last_step_and_keep_the_mean(steps: int) -> None:
    losses = [float(step % 7) for step in range(steps)]
    pairs = thinned(losses)
    assert len(pairs) <= 400
    assert pairs[-1][0] == steps
    widths = [step - before for (step, _), before in zip(pairs, [0, *(step for step, _ in pairs)], strict=False)]
    assert sum(mean * width for (_, mean), width in zip(pairs, widths, strict=True)) == pytest.approx(sum(losses))


def test_thinning_leaves_out_what_is_not_finite() -> None:
    assert thinned([1.0, math.nan, 3.0, math.inf, math.nan], points=3) == ((2, 1.0), (4, 3.0))
    assert thinned([]) == ()


def test_scales_are_recorded_where_they_change() -> None:
    assert changes([]) == ()
    assert changes([1.0, 1.0]) == ((1, 1.0),)


def test_a_record_adds_up_its_turns() -> None:
    steps = [Step(PHASES, 8.0, 1.0, 4.0), Step(PHASES, 8.0, 2.0, 4.0, skipped=True), Step(PHASES, 8.0, 3.0, 2.0)]
    failure = Failure("error", "it broke")
    turns = [Turn(tuple(steps[:2]), 1.5), Turn((steps[2],), 1.0), Turn((), 0.5, failure)]
    run = run_record("bf16", 3, turns, failure=failure, notes=("slow",))
    assert (run.arm, run.seed, run.steps, run.seconds, run.failure) == ("bf16", 3, 3, 3.0, failure)
    assert run.turns == (PHASES, PHASES)
    assert run.losses == ((1, 1.0), (2, 2.0), (3, 3.0))
    assert (run.loss_scales, run.skipped, run.notes) == (((1, 4.0), (3, 2.0)), (2,), ("slow",))


def test_a_loss_that_is_not_finite_is_reported_with_its_step() -> None:
    assert not_finite([turn_of(1.0, 2.0)]) is None
    failure = not_finite([turn_of(1.0, 2.0), turn_of(3.0, math.nan, math.nan)])
    assert failure == Failure("not finite", "the loss became nan by step 4")
    assert not_finite([Turn(())]) is None


def test_a_turns_first_step_is_not_timed_unless_it_is_the_only_one() -> None:
    slow, quick = Step(Phases(9, 3, 3, 3), 8.0, 1.0), Step(PHASES, 8.0, 1.0)
    assert Turn((slow, quick)).phases == PHASES
    assert Turn((slow,)).phases == slow.phases
