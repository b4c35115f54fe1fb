"""Duotone's arms train as `duotone train` does, to the same bits."""

from typing import Any

import pytest
import torch

import duotone.torch as dt
from duotone.compare.arms.catalogue import own_arm
from duotone.compare.arms.stepper import Update
from duotone.train import RunSettings, Trainer

from .curve import assign, curve_settings, curve_task, train

# batch 2 is in the second step, where it overflows in FP16
OUTLIER = 2


def trained(settings: RunSettings) -> Trainer:
    torch.manual_seed(settings.seed)
    trainer = Trainer(curve_task(OUTLIER), settings)
    list(trainer.run())
    return trainer


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("bf16", {}),
        ("bf16", {"optimizer": "lion", "learning_rate": 1e-3}),
        ("fp16", {}),
        ("fp16", {"optimizer": "sgd", "clip_norm": None}),
        ("bf16-true,rounding=stochastic", {}),
    ],
)
def test_equals_the_trainer_bit_for_bit(policy: str, changes: dict[str, Any]):
    expected = trained(curve_settings(policy=policy, **changes))
    updates: list[Update] = []
    stepper = train(assign(own_arm(f"mine={policy}"), OUTLIER, **changes), steps=6, then=updates.append)
    masters, wanted = dt.master_weights(stepper.model), dt.master_weights(expected.model)
    assert masters.keys() == wanted.keys()
    assert all(torch.equal(masters[name], wanted[name]) for name in masters)
    assert sum(bool(each.skipped) for each in updates) == int(expected.scaler.skipped)
    assert bool(updates[1].skipped) == policy.startswith("fp16")


def test_an_overflow_lowers_the_scale():
    updates: list[Update] = []
    train(assign("fp16", OUTLIER), steps=3, then=updates.append)
    assert [float(each.loss_scale) for each in updates] == [65536.0, 65536.0, 32768.0]


def test_without_scaling_the_loss_is_multiplied_by_one():
    updates: list[Update] = []
    stepper = train(assign("fp16-no-scaling"), steps=2, then=updates.append)
    assert [float(each.loss_scale) for each in updates] == [1.0, 1.0]
    assert {weight.dtype for weight in stepper.model.parameters()} == {torch.float16}
