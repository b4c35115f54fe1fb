"""Gradients in the user's hands between backward pass and step: true ones, once, and an overflow is not forgotten."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import LossScaleError, OptimizerError
from duotone.torch.scaling import device_scale

from .settled import settled

pytestmark = pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")


def parameter_of(*values, dtype=torch.float32):
    return nn.Parameter(torch.zeros(len(values), dtype=dtype)), torch.tensor(values)


def scaled(values, *, dtype=torch.float32, kind=dt.SGD, scale=2.0**10):
    """Return a scaler, an optimizer and its parameter, whose true gradient has these values."""
    scaler = settled(dt.LossScaler("fp16", init_scale=scale))
    parameter, true = parameter_of(*values, dtype=dtype)
    scaler.backward((parameter.float() * true).sum())
    return scaler, kind([parameter], lr=1.0), parameter


@pytest.mark.parametrize("kind", [dt.SGD, torch.optim.SGD])
def test_gradients_are_true_until_the_step(kind):
    scaler, optimizer, parameter = scaled([3.0, 4.0], kind=kind)
    assert parameter.grad.tolist() == [3 * 2.0**10, 4 * 2.0**10]
    scaler.unscale_(optimizer)
    assert parameter.grad.tolist() == [3.0, 4.0]
    report = scaler.step(optimizer)
    assert parameter.tolist() == [-3.0, -4.0]
    assert (report.grad_norm.item(), report.loss_scale.item()) == (5.0, 2.0**10)


def test_float64_gradients():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = dt.LossScaler("fp16")
    scaler.backward((weight * torch.tensor([3.0, 4.0], dtype=torch.float64)).sum())
    scaler.unscale_(optimizer)
    assert not scaler.step(optimizer).skipped.item()
    assert weight.tolist() == [-3.0, -4.0]


def test_what_underflows_in_float16_can_be_clipped():
    scaler, optimizer, parameter = scaled([2.0**-30, 2.0**-28], dtype=torch.float16, scale=2.0**16)
    scaler.unscale_(optimizer)
    assert parameter.grad.tolist() == [2.0**-30, 2.0**-28]
    nn.utils.clip_grad_value_([parameter], 2.0**-29)
    assert scaler.step(optimizer).grad_norm.item() == pytest.approx(math.hypot(2.0**-30, 2.0**-29))
    assert parameter.grad.dtype == torch.float16


@pytest.mark.parametrize("kind", [dt.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("clip_norm", [0.25, 1e9])
def test_torch_s_clipping_is_that_of_clip_norm(kind, clip_norm):
    torch.manual_seed(0)
    model, data = nn.Linear(5, 3), torch.randn(7, 5)
    models = [model, copy.deepcopy(model)]
    for ahead, each in enumerate(models):
        optimizer, scaler = kind(each.parameters(), lr=0.1), dt.LossScaler("fp16")
        for _ in range(3):
            scaler.backward(each(data).square().sum())
            if ahead:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(each.parameters(), clip_norm)
            scaler.step(optimizer, clip_norm=None if ahead else clip_norm)
            optimizer.zero_grad()
    assert not torch.equal(model.weight, nn.Linear(5, 3).weight)
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # torch adds 1e-6 to the norm
        torch.testing.assert_close(first, second, rtol=2e-5, atol=1e-7)


def test_clip_norm_comes_on_top():
    scaler, optimizer, parameter = scaled([30.0, 40.0])
    scaler.unscale_(optimizer)
    parameter.grad.mul_(0.1)
    report = scaler.step(optimizer, clip_norm=1.0)
    assert report.grad_norm.item() == pytest.approx(5.0)
    assert parameter.tolist() == pytest.approx([-0.6, -0.8])


@pytest.mark.parametrize("kind", [dt.SGD, torch.optim.SGD])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_overflow_that_user_code_removes_still_skips(kind, bad):
    scaler, optimizer, parameter = scaled([1.0, 2.0], kind=kind)
    parameter.grad[1] = bad
    scaler.unscale_(optimizer)
    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
    assert scaler.step(optimizer).skipped.item()
    assert not parameter.any()
    assert scaler.loss_scale.item() == 2.0**9
    # and is forgotten after the step
    scaler.backward(parameter.sum())
    assert not scaler.step(optimizer).skipped.item()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_user_code_breaks_skips(bad):
    scaler, optimizer, parameter = scaled([1.0, 2.0])
    scaler.unscale_(optimizer)
    parameter.grad[0] = bad
    assert scaler.step(optimizer).skipped.item()
    assert not parameter.any()


@pytest.mark.parametrize("order", [1, -1])
def test_only_one_of_two_optimizers_is_unscaled(order):
    scaler = dt.LossScaler("fp16", init_scale=2.0**10)
    (first, a), (second, b) = parameter_of(1.0), parameter_of(2.0)
    scaler.backward((first * a + second * b).sum())
    optimizers = [dt.SGD([first], lr=1.0), dt.SGD([second], lr=1.0)]
    scaler.unscale_(optimizers[0])
    report = scaler.step(*optimizers[::order])
    assert (first.item(), second.item()) == (-1.0, -2.0)
    assert report.grad_norm.item() == pytest.approx(math.hypot(1.0, 2.0))


def test_once_and_after_the_last_backward_pass():
    scaler, optimizer, parameter = scaled([1.0])
    scaler.unscale_(optimizer)
    with pytest.raises(LossScaleError, match="of this SGD were unscaled since the last step; call unscale_ once"):
        scaler.unscale_(optimizer)
    with pytest.raises(LossScaleError, match="call unscale_ after the last backward pass"):
        scaler.backward(parameter.sum())
    scaler.step(optimizer)
    assert parameter.item() == -1.0
    scaler.backward(parameter.sum())
    scaler.unscale_(optimizer)


def test_a_loss_has_to_be_scaled_before():
    parameter, _ = parameter_of(1.0)
    optimizer, scaler = dt.SGD([parameter], lr=1.0), dt.LossScaler("fp16")
    # nothing to unscale
    scaler.unscale_(optimizer)
    parameter.grad = torch.ones(1)
    with pytest.raises(LossScaleError, match="no loss was scaled since the last step"):
        scaler.unscale_(optimizer)
    assert parameter.grad.item() == 1.0
    # where nothing is scaled, a plain backward pass is as good
    plain = dt.LossScaler("bf16")
    plain.unscale_(optimizer)
    plain.step(optimizer)
    assert parameter.item() == -1.0


def test_gradients_let_go_after_it_leave_nothing_behind():
    scaler, optimizer, parameter = scaled([1.0], dtype=torch.float16)
    scaler.unscale_(optimizer)
    optimizer.zero_grad()
    assert not scaler.step(optimizer).skipped.item()
    assert parameter.grad_dtype == torch.float16
    scaler.backward((parameter * 2).sum())
    assert parameter.grad.dtype == torch.float16
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert parameter.item() == -2.0


def test_what_step_refuses_is_refused():
    embedding = nn.Embedding(4, 3, sparse=True)
    scaler = dt.LossScaler("fp16")
    scaler.backward(embedding(torch.tensor([1])).sum())
    with pytest.raises(OptimizerError, match="sparse gradients cannot be unscaled here"):
        scaler.unscale_(torch.optim.SGD(embedding.parameters(), lr=1.0))
    model = dt.cast(nn.Linear(2, 1), "fp16")
    scaler.backward(model(torch.ones(1, 2)).sum() * 2.0**-10)
    with pytest.raises(OptimizerError, match="would lose small updates"):
        scaler.unscale_(torch.optim.SGD(model.parameters(), lr=1.0))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_no_copies_between_it_and_the_step(copied):
    scaler, optimizer, _ = scaled([1.0])
    scaler.unscale_(optimizer)
    with pytest.raises(LossScaleError, match=r"the step is still to come; copy or pickle after the step"):
        copied(scaler)
    scaler.step(optimizer)
    copied(scaler)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("bad", "power"), [(None, 10), (math.inf, 9), (math.nan, 9)])
def test_an_overflow_that_is_let_go_by_hand_moves_the_scale(monkeypatch, bad, power, on_device):
    if on_device:
        monkeypatch.setattr(device_scale, "is_on_host", lambda device: False)
    scaler, optimizer, parameter = scaled([1.0])
    if bad is not None:
        parameter.grad.fill_(bad)
    scaler.unscale_(optimizer)
    optimizer.zero_grad()
    report = scaler.step(optimizer)
    assert report.skipped.item() == report.skipped_each[0].item() == (bad is not None)
    assert (report.loss_scale.item(), scaler.loss_scale.item()) == (2.0**10, 2.0**power)
    assert scaler.skipped_in_a_row.item() == (bad is not None)
    # it counts once, and not as a step that went well
    scaler.step(optimizer)
    assert scaler.state_dict()["state"]["growth_tracker"] == 0
    assert scaler.loss_scale.item() == 2.0**power


@pytest.mark.parametrize("on_device", [False, True])
def test_a_bad_loss_that_is_let_go_by_hand_leaves_the_scale_alone(monkeypatch, on_device):
    if on_device:
        monkeypatch.setattr(device_scale, "is_on_host", lambda device: False)
    parameter = nn.Parameter(torch.zeros(1))
    scaler, optimizer = dt.LossScaler("fp16", init_scale=8), dt.SGD([parameter], lr=1.0)
    scaler.backward(parameter.sum() * math.nan)
    scaler.unscale_(optimizer)
    optimizer.zero_grad()
    assert scaler.step(optimizer).skipped.item()
    assert (scaler.loss_scale.item(), scaler.skipped.item()) == (8.0, 1)


def test_a_step_that_is_left_out_is_asked_for():
    scaler, optimizer, parameter = scaled([math.inf])
    scaler.unscale_(optimizer)
    optimizer.zero_grad()
    with pytest.raises(LossScaleError, match="and step after it every time, for it skips by itself"):
        scaler.backward(parameter.sum())
    scaler.step(optimizer)
    scaler.backward(parameter.sum())
    assert not scaler.step(optimizer).skipped.item()
