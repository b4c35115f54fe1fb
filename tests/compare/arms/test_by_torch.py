"""PyTorch's arms equal the loops that its documentation has, bit for bit."""

import math
import warnings

import pytest
import torch
from torch import nn

from duotone.compare.arms.stepper import Update
from duotone.errors import ArmError

from .curve import assign, batches_of, train, weights_of


def rate(step: int) -> float:
    """Return the learning rate of `curve_settings` by hand."""
    if step < 2:
        return 1e-2 * (step + 1) / 3
    return 1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 4)) / 2)


@pytest.mark.parametrize(("arm", "enabled"), [("fp32", False), ("torch-amp-bf16", True)])
@pytest.mark.parametrize("clip_norm", [0.05, None])
def test_equals_a_loop_written_by_hand(arm: str, enabled: bool, clip_norm: float | None):
    stepper = train(assign(arm, clip_norm=clip_norm), steps=5)
    assignment = assign(arm)
    model, batches = assignment.task.model, batches_of(assignment)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95), weight_decay=0.01, fused=True)
    for step in range(5):
        for _ in range(2):
            x = next(batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(x, x.square().mean(1, keepdim=True)) / 2
            loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
    expected = weights_of(model)
    assert {name: value.tolist() for name, value in weights_of(stepper.model).items()} == {
        name: value.tolist() for name, value in expected.items()
    }


def test_sgd_has_its_momentum():
    stepper = train(assign("fp32", optimizer="sgd", momentum=0.7, clip_norm=None), steps=3)
    assignment = assign("fp32")
    model, batches = assignment.task.model, batches_of(assignment)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.7, weight_decay=0.01, fused=True)
    for step in range(3):
        for _ in range(2):
            x = next(batches)
            (model(x, x.square().mean(1, keepdim=True)) / 2).backward()
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, weights_of(stepper.model).values(), weights_of(model).values()))


def test_an_overflow_is_skipped_and_seen():
    updates: list[Update] = []
    weights = []
    assignment = assign("torch-amp-fp16", outlier=2)

    def note(update: Update) -> None:
        updates.append(update)
        weights.append([weight.tolist() for weight in weights_of(assignment.task.model).values()])

    train(assignment, steps=4, then=note)
    assert [bool(update.skipped) for update in updates] == [False, True, False, False]
    assert [float(update.loss_scale) for update in updates] == [65536.0, 65536.0, 32768.0, 32768.0]
    assert weights[1] == weights[0]
    assert weights[2] != weights[1]


@pytest.mark.parametrize("arm", ["fp32", "torch-amp-bf16", "torch-amp-fp16"])
def test_torch_sees_the_optimizer_step_before_the_schedule(arm: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(assign(arm), steps=2)


def test_evaluates_in_what_it_trains_in():
    def product_dtype(arm: str) -> torch.dtype:
        with train(assign(arm), steps=0).evaluating():
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    assert product_dtype("fp32") == torch.float32
    assert product_dtype("torch-amp-bf16") == torch.bfloat16
    assert product_dtype("torch-amp-fp16") == torch.float16


def test_torch_has_no_lion():
    with pytest.raises(
        ArmError, match='torch has no optimizer "lion"; compare with --optimizer adamw or sgd'
    ) as raised:
        train(assign("fp32", optimizer="lion"), steps=0)
    assert raised.value.kind == "not possible"
