"""A trial times enough steps, and no more; what fails is its failure."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duotone.compare.arms.catalogue import CATALOGUE
from duotone.compare.failures import WorkerFailed
from duotone.compare.job import Job
from duotone.compare.measuring import trial
from duotone.compare.measuring.arm_trainer import ArmTrainer
from duotone.compare.measuring.footprint import Footprint
from duotone.compare.measuring.turn import Step, Turn
from duotone.compare.records import Failure, Phases
from duotone.train import Task

TINY = str(Path(__file__).parents[1] / "tiny_task.py")


NO_FOOTPRINT = Footprint(torch.device("cpu"), 0)


class PacedTrainer:
    """Takes steps that say how long they were."""

    def __init__(self, step_seconds: float, failure: Failure | None = None) -> None:
        self.taken = 0
        self._step = Step(Phases(step_seconds, 0.0, 0.0, 0.0), 8.0, 1.0)
        self._failure = failure

    def take(self, steps: int) -> Turn:
        self.taken += steps
        return Turn((self._step,) * steps, failure=self._failure)


@pytest.mark.parametrize(
    ("step_seconds", "timed"),
    [(1e-4, 60), (0.019, 60), (0.03, 32), (0.1, 20), (0.3, 8), (3.0, 8), (10.0, 4)],
)
def test_steps_are_timed_until_medians_are_stable(step_seconds: float, timed: int) -> None:
    trainer = PacedTrainer(step_seconds)
    assert len(trial.timed_steps(trainer, NO_FOOTPRINT)) == timed  # type: ignore[arg-type]
    assert trainer.taken == timed + trial.WARMUP_STEPS


def test_an_arm_that_is_too_slow_takes_no_more_steps() -> None:
    trainer = PacedTrainer(10.5)
    assert len(trial.timed_steps(trainer, NO_FOOTPRINT, limit_seconds=10.0)) == 1  # type: ignore[arg-type]
    assert trainer.taken == trial.WARMUP_STEPS + 1


def test_a_step_that_fails_ends_the_trial() -> None:
    with pytest.raises(WorkerFailed, match="it broke"):
        trial.timed_steps(PacedTrainer(0.1, Failure("error", "it broke")), NO_FOOTPRINT)  # type: ignore[arg-type]


def try_tiny(arm: str, changed: dict[str, object] | None = None, profile_path: Path | None = None) -> trial.Trial:
    task, settings = Job(CATALOGUE[arm], TINY, 0, {}).open()
    task: Task = replace(task, **(changed or {}))
    trainer = ArmTrainer(CATALOGUE[arm], task, settings, torch.device("cpu"))
    return trial.try_arm(trainer, CATALOGUE[arm], NO_FOOTPRINT, profile_path)


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_MOST_STEPS", 2)


@pytest.mark.usefixtures("_short")
def test_a_trial_counts_bytes_by_role_and_what_is_saved() -> None:
    fp32, bf16 = try_tiny("fp32"), try_tiny("bf16")
    assert (fp32.parameters, fp32.bytes_per_parameter, bf16.bytes_per_parameter) == (49, 16.0, 14.0)
    assert (fp32.memory["tails"], bf16.memory["tails"]) == (0, 98)
    assert fp32.units_per_step == 8.0
    assert sum(bf16.saved_bytes.values()) < sum(fp32.saved_bytes.values())
    assert fp32.is_deterministic
    assert set(fp32.evaluation) == {"loss"}
    assert fp32.peak_memory_bytes is not None


@pytest.mark.usefixtures("_short")
def test_an_evaluation_that_changes_is_noticed() -> None:
    figures = iter(range(10))
    assert not try_tiny("fp32", {"evaluate": lambda model: {"loss": next(figures)}}).is_deterministic
    # a NaN that comes again is the same
    assert try_tiny("fp32", {"evaluate": lambda model: {"loss": float("nan")}}).is_deterministic
