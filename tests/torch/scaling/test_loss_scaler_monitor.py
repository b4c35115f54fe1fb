"""How a run that cannot go on ends: which module, which loss, after how many steps; and when there is no warning."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import DuotoneWarning, LossScaleCollapse, LossScaleError, NonFiniteLoss
from duotone.loss_scale import LossScale, LossScaleState
from duotone.torch.scaling import device_scale

from .settled import settled


@pytest.fixture(params=["host", "device"])
def delay(request, monkeypatch):
    """Return how many steps later a run ends: on a device, the host reads an outcome when the next step begins."""
    if request.param == "device":
        monkeypatch.setattr(device_scale, "is_on_host", lambda device: False)
    return int(request.param == "device")


class Steep(nn.Linear):
    """Multiplies a small gradient by a large number on the way back, which FP16 does not hold."""

    def forward(self, x):
        return super().forward(x) * 2.0**-24 * 2.0**24


def steep_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), Steep(8, 8)), nn.Linear(8, 2))


def one_step(scaler, optimizer, model, factor=1.0):
    scaler.backward(model(torch.ones(3, 4)).mean() * factor)
    report = scaler.step(optimizer)
    optimizer.zero_grad()
    return report


def grouped(model):
    return [{"params": [p for p in model.parameters() if p.ndim == ndim]} for ndim in (1, 2)]


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
@pytest.mark.parametrize("policy", ["fp16", "fp16-mixed"])
def test_a_collapse_names_the_module_and_its_rule_mends_it(policy, delay):
    model = dt.cast(steep_model(), policy)
    optimizer, scaler = dt.SGD(grouped(model), lr=0.0), dt.LossScaler(policy)
    # at 2^16, and at 1, where one batch alone may be at fault
    for _ in range(2 + delay):
        assert one_step(scaler, optimizer, model).skipped.item()
    with pytest.raises(LossScaleCollapse) as caught:
        one_step(scaler, optimizer, model)
    text = str(caught.value)
    assert text.startswith(
        "3 steps in a row were skipped, the last at loss scale 1, its floor: 6 of 8 gradients are not finite "
        '(0.weight, 0.bias, ..., 1.1.bias); the backward pass met the first in "1.1": '
    )
    rule = text.split('by a rule, "')[1].split('"', maxsplit=1)[0]
    mended = dt.cast(steep_model(), f"{policy}; {rule}")
    optimizer, scaler = dt.SGD(mended.parameters(), lr=0.0), dt.LossScaler(policy)
    assert not any(one_step(scaler, optimizer, mended).skipped.item() for _ in range(3))


@pytest.mark.parametrize(("policy", "at"), [("fp16,loss_scale=8", "loss scale 8"), ("bf16", "no loss scale")])
def test_a_scale_that_stands_still_ends_with_patience(policy, at, delay):
    model = nn.Linear(4, 1)
    optimizer, scaler = dt.SGD(model.named_parameters(), lr=0.0), dt.LossScaler(policy, patience=4)
    model.weight.register_hook(lambda grad: grad * math.inf)
    for _ in range(3 + delay):
        one_step(scaler, optimizer, model)
    with pytest.raises(LossScaleCollapse, match=rf"4 steps .* at {at}: 1 of 2 gradients are not finite \(weight\)"):
        one_step(scaler, optimizer, model)


def test_a_calibration_is_no_alarm(delay):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scaler = dt.SGD([parameter], lr=0.0), settled(dt.LossScaler(LossScale(init_scale=2.0**32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # 32 overflows on the way to the floor, where the first clean step comes at last
        for value in [math.inf] * 32 + [1.0, math.inf, 1.0, math.inf, 1.0]:
            scaler.scale(torch.ones(()))
            parameter.grad = torch.full((1,), value)
            scaler.step(optimizer)
        scaler.drain()
    assert scaler.skipped.item() == 34


def test_patience_counts_steps_in_a_row(delay):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scaler = dt.SGD([parameter], lr=0.0), settled(dt.LossScaler("fp16", patience=3))
    for value in [math.inf, math.inf, 1.0] * 3 + [math.nan, math.inf, math.inf][: 2 + delay]:
        scaler.scale(torch.ones(()))
        parameter.grad = torch.full((1,), value)
        scaler.step(optimizer)
    scaler.scale(torch.ones(()))
    with pytest.raises(LossScaleCollapse, match=r"^3 steps in a row"):
        scaler.step(optimizer)


def test_on_a_device_a_run_that_recovers_in_time_goes_on(monkeypatch):
    monkeypatch.setattr(device_scale, "is_on_host", lambda device: False)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, scaler = dt.SGD([parameter], lr=0.0), dt.LossScaler("fp16", patience=3)
    for value in (math.inf, math.inf, math.inf, 1.0, math.inf, 1.0):
        scaler.scale(torch.ones(()))
        parameter.grad = torch.full((1,), value)
        scaler.step(optimizer)
    assert scaler.skipped_in_a_row.item() == 0


@pytest.mark.parametrize("patience", [0, -1, 2.5, "3", True])
def test_patience_is_a_whole_number(patience):
    with pytest.raises(
        LossScaleError, match=rf"patience is {patience!r}; it must be a whole number from 1 on, or None"
    ):
        dt.LossScaler("fp16", patience=patience)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_loss_that_is_not_finite_is_named_and_leaves_the_scale_alone(bad, place, delay):
    parameter = nn.Parameter(torch.ones(1))
    optimizer, scaler = dt.SGD([parameter], lr=0.0), dt.LossScaler("fp16", hysteresis=2)
    for step in range(1, 4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for micro_batch in range(1, 4):
                is_bad = step >= 2 and micro_batch >= place
                scaler.backward(parameter.sum() * (bad if is_bad else 1.0))
            report = scaler.step(optimizer)
            scaler.drain()
            optimizer.zero_grad()
        assert report.skipped.item() == (step >= 2)
        texts = [str(each.message) for each in caught if each.category is DuotoneWarning]
        assert len(texts) == (step == 2)
        assert all(text.startswith(f"loss {place} of step 2 is not finite: that is the forward pass") for text in texts)
    assert scaler.state_dict()["state"] == vars(LossScaleState(2.0**16, 1, 1, 2, 2))


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_losses_that_are_never_finite_end_the_run_as_what_they_are(delay):
    parameter = nn.Parameter(torch.ones(1))
    optimizer, scaler = dt.SGD([parameter], lr=0.0), dt.LossScaler("fp16", patience=3)
    ends = []
    for step in range(1, 7):
        scaler.backward(parameter.sum())
        scaler.backward(parameter.sum() * math.nan)
        try:
            scaler.step(optimizer)
        except NonFiniteLoss as error:
            ends.append((step, str(error).split(" is not")[0]))
            # a run that goes on is stopped again by the next step
            if delay:
                scaler.step(optimizer)
        optimizer.zero_grad()
    expected = [(n, f"{n} steps in a row were skipped, and loss 2 of step {n}") for n in (3, 4, 5, 6)]
    assert ends == [(n + delay, text) for n, text in expected][: 4 - delay]
    assert scaler.loss_scale.item() == 2.0**16


def test_a_large_finite_loss_that_overflows_when_it_is_scaled_backs_off(delay):
    parameter = nn.Parameter(torch.ones(1))
    optimizer, scaler = dt.SGD([parameter], lr=0.0), dt.LossScaler("fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.backward(parameter.sum() * 3e38)
        assert scaler.step(optimizer).skipped.item()
        scaler.drain()
    assert scaler.loss_scale.item() == 1.0


def test_inside_of_torch_s_function_transforms_a_loss_is_scaled_and_not_checked(delay):
    scaler = dt.LossScaler("fp16", init_scale=8.0)
    scaled = torch.vmap(lambda x: scaler.scale(x * 2))(torch.tensor([1.0, math.nan, 3.0]))
    assert scaled[[0, 2]].tolist() == [16.0, 48.0]
    assert torch.func.grad(lambda x: scaler.scale(x.square()))(torch.tensor(3.0)).item() == 48.0
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(dt.SGD([parameter], lr=0.0))
        scaler.drain()


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_a_copy_counts_on(delay):
    model = nn.Linear(4, 1)
    optimizer, scaler = dt.SGD(model.parameters(), lr=0.0), dt.LossScaler("bf16", patience=3)
    for _ in range(2):
        one_step(scaler, optimizer, model, math.nan)
        scaler = copy.deepcopy(scaler)
    if delay:
        one_step(scaler, optimizer, model, math.nan)
    with pytest.raises(NonFiniteLoss, match="3 steps in a row were skipped, and loss 1 of step 3"):
        one_step(scaler, optimizer, model, math.nan)


@pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
def test_a_bad_loss_before_an_overflow_at_the_floor_is_no_second_overflow(delay):
    model = dt.cast(nn.Linear(4, 1), "fp16")
    optimizer, scaler = dt.SGD(model.parameters(), lr=0.0), dt.LossScaler("fp16", init_scale=1.0)
    for factor in (math.nan, 1e30, 1.0, 1e30, math.nan, 1e30, 1.0):
        # an FP32 loss of 1e30 is finite, its gradients in FP16 are not
        assert one_step(scaler, optimizer, model, factor).skipped.item() == (factor != 1.0)
    for _ in range(1 + delay):
        assert one_step(scaler, optimizer, model, 1e30).skipped.item()
    with pytest.raises(LossScaleCollapse):
        one_step(scaler, optimizer, model, 1e30)


@pytest.mark.parametrize("patience", [50, 3])
def test_of_two_that_take_turns_the_one_that_only_skips_ends_the_run(delay, patience):
    models = steep_model(), nn.Linear(4, 2)
    steep, other = (dt.SGD(dt.cast(model, "fp16").parameters(), lr=0.0) for model in models)
    scaler = dt.LossScaler("fp16", patience=patience)
    # at 2^16, at 4, to which the other's step has led, and twice at the floor
    steps = min(patience, 4)
    for _ in range(steps - 1 + delay):
        assert one_step(scaler, steep, models[0]).skipped.item()
        assert not one_step(scaler, other, models[1]).skipped.item()
    with pytest.raises(LossScaleCollapse, match=rf"^{steps} steps in a row were skipped, .* the first in \"1\.1\": "):
        one_step(scaler, steep, models[0])


@pytest.mark.parametrize("ends", ["step", "drain"])
def test_a_loss_that_is_not_finite_is_warned_of_once_where_two_take_turns(delay, ends):
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizers, scaler = [dt.SGD([each], lr=0.0) for each in parameters], dt.LossScaler("fp16")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for parameter, optimizer, factor in zip(parameters, optimizers, (math.nan, 1.0), strict=True):
                scaler.backward(parameter.sum() * factor)
                scaler.step(optimizer)
                if ends == "drain":
                    scaler.drain()
                optimizer.zero_grad()
    (warning,) = caught
    assert str(warning.message).startswith("loss 1 of step 1 is not finite")
    if ends == "step":
        assert warning.filename == __file__
