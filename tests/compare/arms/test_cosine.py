"""The schedule of every arm is the one that `duotone train` follows."""

import pytest
import torch

from duotone.compare.arms.cosine import cosine_schedule
from duotone.train import RunSettings
from duotone.train.schedule import WarmupCosine


@pytest.mark.parametrize("final_lr_fraction", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 1), (0, 9), (3, 9), (9, 9), (12, 9)])
def test_the_same_numbers_as_in_training(warmup_steps: int, steps: int, final_lr_fraction: float):
    settings = RunSettings(
        learning_rate=3e-3, warmup_steps=warmup_steps, steps=steps, final_lr_fraction=final_lr_fraction
    )
    theirs, ours = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3) for _ in range(2))
    expected = WarmupCosine(
        theirs,
        torch.device("cpu"),
        peak=3e-3,
        warmup_steps=warmup_steps,
        steps=steps,
        final_fraction=final_lr_fraction,
    )
    schedule = cosine_schedule(ours, settings)
    for _ in range(steps + 3):
        assert ours.param_groups[0]["lr"] == pytest.approx(expected.learning_rate.item(), rel=1e-14, abs=1e-18)
        ours.step()
        schedule.step()
        expected.advance(torch.tensor(False))
