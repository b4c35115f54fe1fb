"""A rehearsal fails in silence, but what is warned of in it is heard."""

import warnings

import pytest
import torch

from duotone.compare.arms.catalogue import CATALOGUE, Arm
from duotone.compare.arms.stepper import Taken
from duotone.compare.measuring import rehearsal
from duotone.compare.measuring.course import Course
from duotone.compare.measuring.rehearsal import rehearse
from duotone.train import RunSettings

CPU = torch.device("cpu")


def test_every_part_of_a_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Taken] = []

    class Watched(Course):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            update = self.stepper.update
            self.stepper.update = lambda: taken.append(update()) or taken[-1]  # type: ignore[method-assign]

    monkeypatch.setattr(rehearsal, "Course", Watched)
    rehearse(CATALOGUE["bf16"], RunSettings(micro_batches=2), CPU)
    assert len(taken) == 2


def test_what_fails_is_left_to_the_real_thing() -> None:
    rehearse(Arm("bf8", "duotone", "no policy", "by_duotone:build"), RunSettings(), CPU)


def test_what_is_warned_of_once_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def warning(*_: object) -> None:
        warnings.warn("said once", UserWarning, stacklevel=2)

    monkeypatch.setattr(rehearsal, "Course", warning)
    with pytest.warns(UserWarning, match="said once"):
        rehearse(CATALOGUE["bf16"], RunSettings(), CPU)
