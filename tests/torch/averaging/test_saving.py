"""States and checkpoints of averages: going on changes no bit, and what does not fit is refused."""

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import AverageError, CheckpointError

from .models import backward, bits, small


def make(policy: str, seed: int = 0, **settings):
    model = small(policy, seed)
    return model, dt.AdamW(model.parameters(), lr=1e-2), dt.Average(model, **{"decay": 0.9, **settings})


def train(parts, steps: int, first: int = 0) -> None:
    model, optimizer, average = parts
    for step in range(first, first + steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        average.update()


@pytest.mark.parametrize("settings", [{}, {"warmup_power": 0.75, "average_buffers": True}, {"decay": None}])
@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1", "fp32"])
def test_going_on_changes_no_bit(tmp_path, policy, settings):
    parts = make(policy, **settings)
    train(parts, 3)
    dt.save_checkpoint(tmp_path / "last", *parts[:2], average=parts[2])
    train(parts, 3, 3)
    # settings come with the state
    other = make(policy, seed=1, decay=0.5)
    train(other, 1)
    dt.load_checkpoint(tmp_path / "last", *other[:2], average=other[2])
    assert other[2].updates.item() == 3
    train(other, 3, 3)
    assert bits(other[2].state_dict()) == bits(parts[2].state_dict())


def test_another_policy_keeps_the_averages(tmp_path):
    parts = make("bf16")
    train(parts, 3)
    dt.save_checkpoint(tmp_path / "last", *parts[:2], average=parts[2])
    other = make("fp16,loss_scale=1", seed=1)
    dt.load_checkpoint(tmp_path / "last", *other[:2], average=other[2], convert=True)
    assert bits(other[2].state_dict()) == bits(parts[2].state_dict())


def test_checkpoints_without_one(tmp_path):
    parts = make("bf16")
    dt.save_checkpoint(tmp_path / "last", *parts[:2])
    with pytest.raises(CheckpointError, match="holds no average; load it without one"):
        dt.load_checkpoint(tmp_path / "last", parts[0], average=parts[2])
    dt.save_checkpoint(tmp_path / "last", parts[0], average=parts[2])
    dt.load_checkpoint(tmp_path / "last", parts[0])


def test_what_cannot_be_loaded_changes_nothing(tmp_path):
    parts = make("bf16")
    train(parts, 2)
    dt.save_checkpoint(tmp_path / "last", parts[0], average=parts[2])
    train(parts, 1, 2)
    before = bits(parts[2].state_dict()), bits(parts[0].state_dict())
    elsewhere = dt.Average(nn.Linear(2, 2))
    with pytest.raises(
        CheckpointError, match=r'does not fit: the state is not one of an average of this model: .* no "weight"'
    ):
        dt.load_checkpoint(tmp_path / "last", parts[0], average=elsewhere)
    # a part that fails after it
    scheduler = torch.optim.lr_scheduler.LambdaLR(parts[1], lambda step: 0.5)
    with pytest.raises(CheckpointError, match="holds no scheduler"):
        dt.load_checkpoint(tmp_path / "last", parts[0], scheduler=scheduler, average=parts[2])
    state = parts[2].state_dict()
    wrong = {"embed.weight": torch.zeros(3), "norm.weight": torch.zeros(8, dtype=torch.float64)}
    for name, value in wrong.items():
        with pytest.raises(
            AverageError, match=f'the average of "{name}" is {value.dtype} .* in the state, not torch.float32'
        ):
            parts[2].load_state_dict({**state, "averages": {**state["averages"], name: value}})
    without = {name: value for name, value in state["averages"].items() if name != "empty"}
    with pytest.raises(AverageError, match='the state has no "empty"'):
        parts[2].load_state_dict({**state, "averages": without})
    with pytest.raises(AverageError, match='the model has no "other"'):
        parts[2].load_state_dict({**state, "averages": {**state["averages"], "other": torch.zeros(1)}})
    for broken in ({}, {**state, "settings": {"decay": 2.0}}, {**state, "settings": {"beta": 1}}):
        with pytest.raises(AverageError, match="this is not the state of an Average"):
            parts[2].load_state_dict(broken)
    assert (bits(parts[2].state_dict()), bits(parts[0].state_dict())) == before


def test_an_average_that_was_loaded_is_a_copy():
    parts, other = make("bf16"), make("bf16", seed=1)
    train(parts, 2)
    state = parts[2].state_dict()
    before = bits(state)
    other[2].load_state_dict(state)
    train(other, 2)
    assert bits(state) == before
