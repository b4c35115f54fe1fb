"""An error in the warm-up of a process is ignored; its warnings are not."""

import warnings

import pytest
import torch

from duotone.compare.arms.catalogue import CATALOGUE, Arm
from duotone.compare.arms.stepper import Update
from duotone.compare.measuring import process_warm_up
from duotone.compare.measuring.arm_trainer import ArmTrainer
from duotone.compare.measuring.process_warm_up import warm_up_process
from duotone.train import RunSettings

CPU = torch.device("cpu")


def test_every_part_of_a_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[Update] = []

    class Watched(ArmTrainer):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            update = self.stepper.update
            self.stepper.update = lambda: updates.append(update()) or updates[-1]  # type: ignore[method-assign]

    monkeypatch.setattr(process_warm_up, "ArmTrainer", Watched)
    warm_up_process(CATALOGUE["bf16"], RunSettings(micro_batches=2), CPU)
    assert len(updates) == 2


def test_what_fails_is_left_to_the_real_thing() -> None:
    warm_up_process(Arm("bf8", "duotone", "no policy", "by_duotone:build"), RunSettings(), CPU)


def test_what_is_warned_of_once_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def warning(*_: object) -> None:
        warnings.warn("said once", UserWarning, stacklevel=2)

    monkeypatch.setattr(process_warm_up, "ArmTrainer", warning)
    with pytest.warns(UserWarning, match="said once"):
        warm_up_process(CATALOGUE["bf16"], RunSettings(), CPU)
