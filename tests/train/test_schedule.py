"""The learning-rate schedule against its equation in plain Python."""

import math

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.train.schedule import WarmupCosine


def schedule_for(optimizer, warmup_steps=3, steps=10, final_fraction=0.2):
    return WarmupCosine(
        optimizer,
        torch.device("cpu"),
        peak=0.5,
        warmup_steps=warmup_steps,
        steps=steps,
        final_fraction=final_fraction,
    )


@pytest.fixture
def optimizer():
    return dt.SGD([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("warmup_steps", [0, 3, 10, 12])
def test_it_follows_its_equation(optimizer, warmup_steps):
    schedule = schedule_for(optimizer, warmup_steps)
    for t in range(15):
        if t < warmup_steps:
            expected = 0.5 * (t + 1) / (warmup_steps + 1)
        else:
            position = min(1.0, (t - warmup_steps) / max(1, 10 - warmup_steps))
            expected = 0.5 * (0.2 + 0.8 * (1 + math.cos(math.pi * position)) / 2)
        assert schedule.learning_rate.item() == pytest.approx(expected, rel=1e-12)
        assert all(group["lr"] is schedule.learning_rate for group in optimizer.param_groups)
        schedule.advance(torch.tensor(False))


def test_a_skipped_step_does_not_count(optimizer):
    schedule = schedule_for(optimizer)
    before = schedule.learning_rate.item()
    schedule.advance(torch.tensor(True))
    assert schedule.learning_rate.item() == before
    schedule.advance(torch.tensor(False))
    assert schedule.learning_rate.item() > before


def test_its_state_is_its_count(optimizer):
    schedule = schedule_for(optimizer)
    for _ in range(6):
        schedule.advance(torch.tensor(False))
    other = schedule_for(dt.SGD([nn.Parameter(torch.zeros(1))]))
    other.load_state_dict(schedule.state_dict())
    assert torch.equal(other.learning_rate, schedule.learning_rate)
    other.advance(torch.tensor(False))
    assert schedule.state_dict()["count"].item() == 6
