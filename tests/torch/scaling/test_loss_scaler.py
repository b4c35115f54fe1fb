"""The scaler on the device: what it does to losses, how its scale moves, and how misuse is named."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import LossScaleError
from duotone.loss_scale import LossScale

from .settled import settled


def overflow(parameter: nn.Parameter, value: float = math.inf) -> None:
    parameter.grad = torch.full_like(parameter, value)


def one_step(scaler: dt.LossScaler, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, value: float):
    scaler.scale(torch.ones(()))
    overflow(parameter, value)
    return scaler.step(optimizer)


@pytest.fixture
def parameter():
    return nn.Parameter(torch.zeros(3))


@pytest.fixture
def optimizer(parameter):
    return dt.SGD([parameter], lr=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_loss_is_scaled_in_float32(dtype, shape):
    # 3 * 65536 does not fit FP16: torch.amp gives Inf for a loss of one element
    scaled = dt.LossScaler("fp16").scale(torch.full(shape, 3.0, dtype=dtype))
    assert scaled.dtype == torch.float32
    assert scaled.item() == 3 * 65536.0


def test_the_scale_backs_off_and_grows(parameter, optimizer):
    scaler = settled(dt.LossScaler("fp16", init_scale=2.0**4, growth_interval=2))
    scales = []
    for value in (math.inf, 1.0, 1.0, 1.0, math.nan, -math.inf, 1.0, 1.0):
        report = one_step(scaler, optimizer, parameter, value)
        assert report.skipped.item() == (not math.isfinite(value))
        scales.append(report.loss_scale.item())
    # a report has the scale of its gradients, which is the one before the step
    assert scales == [16, 8, 8, 16, 16, 8, 4, 4]
    assert scaler.loss_scale.item() == 8
    assert scaler.skipped.item() == 3
    assert scaler.skipped_in_a_row.item() == 0


def test_it_stops_at_the_floor(parameter, optimizer):
    scaler = dt.LossScaler("fp16", init_scale=4.0, min_scale=2.0, patience=None)
    for _ in range(100):
        one_step(scaler, optimizer, parameter, math.inf)
    assert scaler.loss_scale.item() == 2.0
    assert scaler.skipped_in_a_row.item() == 100


def test_a_static_scale_stands_still(parameter, optimizer):
    scaler = dt.LossScaler("fp16,loss_scale=128")
    for value in (1.0, math.inf, 1.0):
        assert one_step(scaler, optimizer, parameter, value).loss_scale.item() == 128.0
    assert scaler.skipped.item() == 1


def test_without_scaling_non_finite_gradients_are_still_skipped(parameter, optimizer):
    scaler = dt.LossScaler("bf16")
    loss = torch.tensor(3.0)
    assert scaler.scale(loss) is loss
    assert scaler.scale(loss.half()).dtype == torch.float32
    optimizer.param_groups[0]["lr"] = 1.0
    # nothing is scaled, so a plain loss.backward() is as good
    overflow(parameter, math.nan)
    assert scaler.step(optimizer).skipped.item()
    assert not parameter.any()
    overflow(parameter, 1.0)
    assert not scaler.step(optimizer).skipped.item()
    assert (parameter == -1).all()


def test_forgetting_to_scale_is_named(parameter, optimizer):
    scaler = dt.LossScaler("fp16")
    overflow(parameter, 1.0)
    with pytest.raises(LossScaleError, match=r"no loss was scaled since the last step.*scaler\.backward\(loss\)"):
        scaler.step(optimizer)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    with pytest.raises(LossScaleError, match="no loss was scaled"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.ones(2, 2), r"the loss has shape \(2, 2\), not one element; take its mean or its sum"),
        (torch.ones(0), r"the loss has shape \(0,\), not one element"),
        (torch.tensor(1), "a loss must be a floating-point tensor, not torch.int64"),
        (1.0, "a loss must be a floating-point tensor, not float"),
    ],
)
def test_a_bad_loss_is_named(loss, message):
    with pytest.raises(LossScaleError, match=message):
        dt.LossScaler("fp16").backward(loss)


def test_settings_come_from_the_policy_or_are_given():
    assert dt.LossScaler("fp16").settings == LossScale.dynamic()
    assert dt.LossScaler("fp16,loss_scale=8").settings == LossScale.static(8)
    assert dt.LossScaler("bf16").settings == LossScale.none()
    assert dt.LossScaler(LossScale(hysteresis=3)).settings.hysteresis == 3
    assert dt.LossScaler("fp16", hysteresis=2).settings == LossScale(hysteresis=2)
    assert dt.LossScaler(LossScale(hysteresis=3), init_scale=8).settings == LossScale(hysteresis=3, init_scale=8)
    with pytest.raises(LossScaleError, match="hysteresis given, but this policy does not move its loss scale"):
        dt.LossScaler("bf16", hysteresis=2)
    with pytest.raises(LossScaleError, match="power of two"):
        dt.LossScaler("fp16", init_scale=1000)


def test_a_setting_that_is_not_there_is_named():
    for policy in ("fp16", "bf16"):
        with pytest.raises(LossScaleError, match='there is no setting "initial_scale"; did you mean init_scale'):
            dt.LossScaler(policy, initial_scale=2.0**10)


def test_it_shows_what_it_is_at():
    assert repr(dt.LossScaler("fp16")).startswith(
        "LossScaler(loss_scale=65536, skipped=0, LossScale(init_scale=65536.0"
    )


def test_its_state_goes_through_json(parameter, optimizer):
    scaler = dt.LossScaler("fp16", growth_interval=3)
    for value in (math.inf, 1.0, 1.0):
        one_step(scaler, optimizer, parameter, value)
    state = json.loads(json.dumps(scaler.state_dict()))
    assert {name for name, value in state["state"].items() if isinstance(value, float)} == {"scale"}
    other = dt.LossScaler("fp16")
    other.load_state_dict(state)
    for value in (1.0, math.inf):
        for each in (scaler, other):
            one_step(each, optimizer, parameter, value)
    assert other.state_dict() == scaler.state_dict()
    assert other.settings == scaler.settings


def test_a_state_of_a_grad_scaler_is_named():
    with pytest.raises(LossScaleError, match="it has no 'settings'; a GradScaler's goes into a GradScaler"):
        dt.LossScaler("fp16").load_state_dict(dt.GradScaler("cpu").state_dict())


@pytest.mark.parametrize("change", [lambda s: s.pop("state"), lambda s: s["state"].update(more=1), lambda s: s.clear()])
def test_a_wrong_state_is_refused_whole(change):
    scaler = dt.LossScaler("fp16", init_scale=8)
    before = scaler.state_dict()
    wrong = copy.deepcopy(dt.LossScaler("fp16").state_dict())
    change(wrong)
    with pytest.raises(LossScaleError, match="not the state of a LossScaler"):
        scaler.load_state_dict(wrong)
    assert scaler.state_dict() == before


@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=8"])
def test_a_scale_that_cannot_move_is_not_loaded_as_another(policy):
    scaler = dt.LossScaler(policy)
    before = scaler.state_dict()
    with pytest.raises(LossScaleError, match=r"the scale is 4\.0, but by its settings it stays at \d"):
        scaler.load_state_dict({**before, "state": {**before["state"], "scale": 4.0}})
    assert scaler.state_dict() == before


@pytest.mark.parametrize("scale", [0.0, 1000.0, math.inf, 2.0**40])
def test_a_scale_that_could_not_be_is_refused(scale):
    scaler = dt.LossScaler("fp16")
    before = scaler.state_dict()
    with pytest.raises(LossScaleError, match="init_scale"):
        scaler.load_state_dict({**before, "state": {**before["state"], "scale": scale}})
    assert scaler.state_dict() == before


def test_a_copy_is_independent(parameter, optimizer):
    scaler = dt.LossScaler("fp16")
    one_step(scaler, optimizer, parameter, 1.0)
    copied = copy.deepcopy(scaler)
    one_step(scaler, optimizer, parameter, math.inf)
    assert copied.loss_scale.item() == 2.0**16
    assert scaler.loss_scale.item() == 2.0**15
