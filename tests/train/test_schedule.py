"""The learning-rate schedule against its equation in plain Python, and as checkpoints hold it."""

import math

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.run_settings import RunSettings
from duotone.train import cosine_schedule
from duotone.train.schedule import SavedSchedule


def make(warmup_steps=3, steps=10, final=0.2):
    settings = RunSettings(learning_rate=0.5, warmup_steps=warmup_steps, steps=steps, final_lr_fraction=final)
    groups = [{"params": [nn.Parameter(torch.zeros(size))]} for size in (2, 1)]
    optimizer = dt.SGD(groups, lr=0.5)
    return optimizer, cosine_schedule(optimizer, settings)


def advance(optimizer, schedule, steps):
    for _ in range(steps):
        optimizer.step()
        schedule.step()


def rates_of(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("final", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 1), (0, 10), (3, 10), (10, 10), (12, 10)])
def test_it_follows_its_equation(warmup_steps, steps, final):
    optimizer, schedule = make(warmup_steps, steps, final)
    for t in range(steps + 5):
        if t < warmup_steps:
            expected = 0.5 * (t + 1) / (warmup_steps + 1)
        else:
            position = min(1.0, (t - warmup_steps) / max(1, steps - warmup_steps))
            expected = 0.5 * (final + (1 - final) * (1 + math.cos(math.pi * position)) / 2)
        assert rates_of(optimizer) == schedule.get_last_lr() == pytest.approx([expected] * 2, rel=1e-12, abs=1e-18)
        advance(optimizer, schedule, 1)


def test_a_skipped_step_does_not_count():
    optimizer, schedule = make()
    (weight,) = optimizer.param_groups[0]["params"]
    scaler = dt.LossScaler("fp16")
    rates = []
    for factor in (1.0, math.inf, 1.0):
        scaler.backward((weight * factor).sum())
        scaler.step(optimizer, scheduler=schedule)
        optimizer.zero_grad()
        rates += rates_of(optimizer)[:1]
    assert rates[0] == rates[1] < rates[2]


def test_it_goes_on_where_it_was_saved():
    optimizer, schedule = make()
    advance(optimizer, schedule, 6)
    other, restored = make()
    other.load_state_dict(optimizer.state_dict())
    SavedSchedule(restored).load_state_dict(SavedSchedule(schedule).state_dict())
    for _ in range(3):
        assert rates_of(other) == rates_of(optimizer) == restored.get_last_lr()
        advance(optimizer, schedule, 1)
        advance(other, restored, 1)


@pytest.mark.parametrize("step", [0, 1, 2, 6, 30])
def test_earlier_checkpoints_hold_a_count_and_a_tensor(recwarn, step):
    optimizer, schedule = make()
    advance(optimizer, schedule, step)
    other, restored = make()
    earlier = optimizer.state_dict()
    for group in earlier["param_groups"]:
        del group["initial_lr"]
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    other.load_state_dict(earlier)
    SavedSchedule(restored).load_state_dict({"count": torch.tensor(step)})
    assert restored.state_dict() == schedule.state_dict()
    for _ in range(3):
        assert rates_of(other) == rates_of(optimizer) == restored.get_last_lr()
        assert all(isinstance(rate, float) for rate in rates_of(other))
        advance(optimizer, schedule, 1)
        advance(other, restored, 1)
    assert [str(each.message) for each in recwarn] == []
