"""Warnings and errors when overflows drive a scale down, and that an accelerator is not waited for."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from duotone.errors import DuotoneWarning, LossScaleCollapse
from duotone.torch.scaling import scale_alarm
from duotone.torch.scaling.scale_alarm import FLOOR, ScaleAlarm


class Elsewhere(torch.Tensor):
    """A tensor that says it is on an accelerator."""

    @property
    def device(self):  # type: ignore[override]
        return torch.device("cuda")

    def item(self):
        raise AssertionError("the host waits")

    def __bool__(self):
        raise AssertionError("the host waits")


class Sent:
    """What was sent last, as it arrives one step later."""

    def __init__(self):
        self.values = None

    def send(self, values):
        self.values = values.as_subclass(torch.Tensor).tolist()

    def receive(self):
        values, self.values = self.values, None
        return values


def follow(alarm, scale, found_inf, like=torch.Tensor, optimizers=()):
    alarm.follow(torch.tensor(scale).as_subclass(like), torch.tensor(found_inf).as_subclass(like), optimizers)


def test_below_one_is_warned_of_once(recwarn):
    alarm = ScaleAlarm()
    for scale, found_inf in [(2.0, 1.0), (1.0, 1.0), (0.5, 0.0)]:
        follow(alarm, scale, found_inf)
    assert not recwarn
    with pytest.warns(DuotoneWarning, match=r"fallen below 1, to 0\.25: .* use policy \"bf16\""):
        follow(alarm, 0.25, 1.0)
    for same in (alarm, copy.deepcopy(alarm), pickle.loads(pickle.dumps(alarm))):
        follow(same, 0.125, 1.0)
    assert not recwarn


def test_a_collapse_names_gradients():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    model[1].weight.grad[0, 1] = math.nan
    model[1].bias.grad[0] = math.inf
    optimizer = torch.optim.SGD(model.named_parameters())
    alarm = ScaleAlarm()
    follow(alarm, FLOOR, 0.0, optimizers=[optimizer])
    with pytest.raises(LossScaleCollapse, match=r"floor, 2\*\*-126: 2 of 4 .* not finite now \(1\.weight, 1\.bias\)"):
        follow(alarm, FLOOR, 1.0, optimizers=[optimizer])
    with pytest.raises(LossScaleCollapse, match=r"floor, 2\*\*-126\. No scale can help"):
        follow(alarm, FLOOR, 1.0)


def test_on_an_accelerator_it_comes_one_step_later(monkeypatch, recwarn):
    monkeypatch.setattr(scale_alarm, "Readback", Sent)
    alarm = ScaleAlarm()
    follow(alarm, 0.5, 1.0, Elsewhere)
    assert not recwarn
    with pytest.warns(DuotoneWarning, match="to 0.5"):
        follow(alarm, FLOOR, 0.0, Elsewhere)
    follow(alarm, FLOOR, 1.0, Elsewhere)
    with pytest.raises(LossScaleCollapse):
        follow(alarm, 1.0, 0.0, Elsewhere)
    follow(alarm, 1.0, 0.0, Elsewhere)
