"""A trainer trains as the Trainer does, whatever its turns, and tells what went wrong."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duotone.compare.arms.catalogue import CATALOGUE
from duotone.compare.job import Job
from duotone.compare.measuring.arm_trainer import ArmTrainer
from duotone.errors import LossScaleCollapse, TaskError
from duotone.train import Trainer

TINY = str(Path(__file__).parents[1] / "tiny_task.py")
CPU = torch.device("cpu")


def job_of(arm: str, seed: int = 0, **settings: object) -> Job:
    return Job(CATALOGUE[arm], TINY, seed, settings)


def course_of(arm: str, seed: int = 0, **settings: object) -> ArmTrainer:
    task, resolved = job_of(arm, seed, **settings).open()
    return ArmTrainer(CATALOGUE[arm], task, resolved, CPU)


def losses_of(trainer: ArmTrainer, turn_steps: int, steps: int) -> list[float]:
    turns = [trainer.take(turn_steps) for _ in range(steps // turn_steps)]
    return [step.loss for turn in turns for step in turn.steps]


def test_turns_do_not_change_what_is_trained() -> None:
    one = course_of("bf16")
    losses = losses_of(one, 1, 7)
    # begun only now, for they draw from the same random state
    other = course_of("bf16")
    assert losses_of(other, 7, 7) == losses
    assert other.evaluate() == one.evaluate()


def test_a_course_trains_as_the_trainer_does() -> None:
    task, settings = job_of("bf16", 3, steps=6, log_every=1, micro_batches=2).open()
    expected = [metrics.loss for metrics in Trainer(task, settings).run()]
    # the sum of halves is the half of the sum: every digit is the same
    assert losses_of(course_of("bf16", 3, steps=6, micro_batches=2), 3, 6) == pytest.approx(expected, rel=1e-6)


def test_arms_begin_with_the_same_weights_and_batches_and_seeds_differ() -> None:
    fp32, bf16, other = (losses_of(course_of(arm, seed), 1, 1) for arm, seed in (("fp32", 1), ("bf16", 1), ("fp32", 2)))
    assert fp32 == pytest.approx(bf16, rel=0.02)
    assert fp32 != pytest.approx(other, rel=0.02)


def test_a_step_counts_its_units_times_and_scale() -> None:
    turn = course_of("fp16", micro_batches=2).take(3)
    assert [step.units for step in turn.steps] == [16.0] * 3
    assert all(step.loss_scale >= 1 for step in turn.steps)
    assert all(min(step.phases.forward, step.phases.backward, step.phases.update) > 0 for step in turn.steps)
    assert turn.seconds >= sum(step.phases.step for step in turn.steps)


def test_no_collection_runs_in_a_turn() -> None:
    seen = []
    trainer = course_of("fp32")
    loss = trainer.task.loss

    def watched(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(gc.isenabled())
        return loss(model, batch)

    object.__setattr__(trainer.task, "loss", watched)
    trainer.take(2)
    assert seen == [False, False]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(RuntimeError("no"), "error"), (LossScaleCollapse("no"), "not finite"), (MemoryError(), "out of memory")],
)
def test_an_error_ends_a_turn_and_keeps_its_steps(error: Exception, kind: str, capfd: pytest.CaptureFixture) -> None:
    trainer = course_of("fp32")
    trainer.take(2)
    loss, calls = trainer.task.loss, []

    def failing(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 3:
            raise error
        return loss(model, batch)

    object.__setattr__(trainer.task, "loss", failing)
    turn = trainer.take(5)
    assert len(turn.steps) == 2
    assert turn.failure is not None
    assert turn.failure.kind == kind
    assert "Traceback" in capfd.readouterr().err
    assert gc.isenabled()


def test_what_fails_when_the_device_is_read_is_the_turns_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(values: object) -> list[float]:
        raise torch.AcceleratorError("an address that is none")

    trainer = course_of("fp32")
    monkeypatch.setattr("duotone.compare.measuring.arm_trainer._numbers", failing)
    turn = trainer.take(2)
    assert turn.steps == ()
    assert turn.failure is not None
    assert turn.failure.reason == "AcceleratorError: an address that is none"


def test_what_is_wrong_with_the_task_is_not_the_arms_failure() -> None:
    task, settings = job_of("fp32").open()
    empty = ArmTrainer(CATALOGUE["fp32"], replace(task, batches=lambda generator: ()), settings, CPU)
    with pytest.raises(TaskError, match="the data set of task 'tiny' is empty"):
        empty.take(1)
    task, settings = job_of("fp32").open()
    wide = ArmTrainer(CATALOGUE["fp32"], replace(task, loss=lambda model, x: model(x)), settings, CPU)
    with pytest.raises(TaskError, match=r"the loss of task 'tiny' is a tensor of shape \(8, 1\)"):
        wide.take(1)
    task, settings = job_of("fp32").open()
    other = ArmTrainer(CATALOGUE["fp32"], replace(task, quality="accuracy"), settings, CPU)
    with pytest.raises(TaskError, match="evaluates loss, but its quality is 'accuracy'"):
        other.evaluate()
