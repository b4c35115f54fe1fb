"""What goes wrong in the loss scalers of other libraries, and is right here: one test for each defect.

Keras lets the scale reach 0 and Inf; jmp loses its floor in a round trip; MPX unscales with the scale of the next step
and clamps to a number that is no power of two; Flax grows a step late and overflows FP16 losses; DeepSpeed and Megatron
begin at 2^32, and after hysteresis was used up once, every overflow backs off.
"""

import json
import math

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import LossScaleError
from duotone.loss_scale import LossScale
from duotone.torch.scaling.step import StepReport

from .settled import settled


class Weight:
    """One weight whose true gradient is given, or an overflow of it."""

    def __init__(self, scaler: dt.LossScaler, lr: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        self.value = nn.Parameter(torch.zeros(2, dtype=dtype))
        self.optimizer = dt.SGD([self.value], lr=lr)
        self.scaler = scaler

    def step(self, overflows: bool = False, true: float = 1.0, ahead: bool = False) -> StepReport:
        self.scaler.backward(self.value.float().sum() * true)
        assert self.value.grad is not None
        if overflows:
            self.value.grad[1] = math.inf
        if ahead:
            self.scaler.unscale_(self.optimizer)
        report = self.scaler.step(self.optimizer)
        self.optimizer.zero_grad()
        return report

    def scales(self, steps: str) -> list[float]:
        """Return the powers of two of the scale after each step; o is an overflow."""
        return [self._power_after(step == "o") for step in steps if step != " "]

    def _power_after(self, overflows: bool) -> float:
        assert self.step(overflows).skipped.item() == overflows
        return math.log2(self.scaler.loss_scale.item())


def scaler_of(**settings: float) -> dt.LossScaler:
    # floors are stood at for long here
    return settled(dt.LossScaler("fp16", patience=None, **settings))


# as they begin in each library
@pytest.mark.parametrize(
    "settings",
    [
        {"init_scale": 2.0**16, "growth_interval": 2000},
        {"init_scale": 2.0**15, "growth_interval": 2000},
        {"init_scale": 2.0**32, "growth_interval": 1000, "hysteresis": 2},
        {"init_scale": 2.0**16, "min_scale": 2.0**-126},
    ],
)
def test_the_scale_is_never_0_and_comes_back(settings):
    weight = Weight(scaler_of(**settings), lr=1.0)
    floor = settings.get("min_scale", 1.0)
    for _ in range(200):
        assert weight.step(overflows=True).skipped.item()
        assert weight.scaler.loss_scale.item() >= floor
    assert weight.scaler.loss_scale.item() == floor
    assert weight.value.tolist() == [0.0, 0.0]
    # and the gradient is still right there, a scale of 2^-126 included
    assert not weight.step(true=0.5).skipped.item()
    assert weight.value.tolist() == [-0.5, -0.5]
    state = weight.scaler.state_dict()
    weight.scaler.load_state_dict({**state, "settings": {**state["settings"], "growth_interval": 1}})
    assert weight.scales("...") == [math.log2(floor) + step for step in (1, 2, 3)]


@pytest.mark.parametrize("max_scale", [2.0**32, 2.0**127, 2.0**15])
def test_the_scale_is_never_inf_and_comes_back(max_scale):
    weight = Weight(scaler_of(growth_interval=1, init_scale=2.0**14, max_scale=max_scale), lr=1.0)
    top = math.log2(max_scale)
    powers = weight.scales("." * 120)
    assert powers == [min(15.0 + step, top) for step in range(120)]
    assert weight.value.tolist() == [-120.0, -120.0]
    # an overflow leaves the ceiling like any other scale
    assert weight.scales("oo.o..") == [top - 1, top - 2, top - 1, top - 2, top - 1, top]
    assert weight.value.tolist() == [-123.0, -123.0]


def test_at_the_largest_scale_of_all_an_overflow_is_an_overflow():
    # a gradient of 4 times 2^126 is Inf in FP32 too
    weight = Weight(scaler_of(init_scale=2.0**127, max_scale=2.0**127), lr=1.0)
    skipped = [weight.step(true=4.0).skipped.item() for _ in range(4)]
    assert skipped == [True, True, False, False]
    assert weight.scaler.loss_scale.item() == 2.0**125
    assert weight.value.tolist() == [-8.0, -8.0]


@pytest.mark.parametrize("bounds", [{"min_scale": 2.0**6}, {"max_scale": 2.0**17}, {"min_scale": 4.0, "hysteresis": 2}])
def test_bounds_survive_a_round_trip(bounds):
    scaler = scaler_of(growth_interval=1, **bounds)
    other = dt.LossScaler("fp16", patience=None)
    other.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    assert other.settings == scaler.settings
    weight = Weight(other)
    assert min(weight.scales("o" * 30)) == math.log2(bounds.get("min_scale", 1.0))
    # again, from the floor
    again = dt.LossScaler("bf16", patience=None)
    again.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert Weight(again).scales("oo") == [math.log2(bounds.get("min_scale", 1.0))] * 2
    assert max(Weight(again).scales("." * 40)) == math.log2(bounds.get("max_scale", 2.0**32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("steps", ["....", "o.o.", ".o..o..", "..oo.."])
def test_gradients_carry_the_scale_that_was_applied(steps, ahead, dtype):
    # the scale moves in every step, and each update is the true gradient all the same
    weight = Weight(scaler_of(growth_interval=1, init_scale=2.0**6), lr=1.0, dtype=dtype)
    expected = 0.0
    for number, step in enumerate(steps):
        before = weight.scaler.loss_scale.item()
        true = 1.0 + number / 4
        report = weight.step(step == "o", true, ahead)
        expected -= 0.0 if step == "o" else true
        assert report.loss_scale.item() == before
        assert weight.scaler.loss_scale.item() == before * (0.5 if step == "o" else 2.0)
        assert weight.value.tolist() == [expected, expected]
        if step != "o":
            assert report.grad_norm.item() == pytest.approx(true * math.sqrt(2.0), rel=1e-6)


def test_clipping_on_a_growth_step_sees_the_scale_that_was_applied():
    weight = Weight(scaler_of(growth_interval=1), lr=1.0)
    for step in range(1, 4):
        weight.scaler.backward(weight.value.sum() * 3.0)
        report = weight.scaler.step(weight.optimizer, clip_norm=math.sqrt(2.0))
        weight.optimizer.zero_grad()
        assert report.grad_norm.item() == pytest.approx(3.0 * math.sqrt(2.0), rel=1e-6)
        assert weight.value.tolist() == pytest.approx([-float(step)] * 2, rel=1e-6)


@pytest.mark.parametrize("name", ["init_scale", "min_scale", "max_scale", "growth_factor", "backoff_factor"])
@pytest.mark.parametrize("value", [65504.0, 3.0, 0.3, 0.0, math.inf, math.nan])
def test_nothing_but_powers_of_two_is_taken(name, value):
    with pytest.raises(LossScaleError, match=f"{name} must be a power of two"):
        dt.LossScaler("fp16", **{name: value})


@pytest.mark.parametrize(("growth_factor", "backoff_factor"), [(4.0, 0.5), (8.0, 0.25), (2.0, 0.0625)])
def test_it_stays_a_power_of_two_where_a_factor_leads_beyond_a_bound(growth_factor, backoff_factor):
    bounds = {"min_scale": 2.0**5, "max_scale": 2.0**15}
    factors = {"growth_factor": growth_factor, "backoff_factor": backoff_factor}
    weight = Weight(scaler_of(growth_interval=1, init_scale=2.0**8, **bounds, **factors))
    up, down = math.log2(growth_factor), math.log2(backoff_factor)
    power = 8.0
    for step in ".....ooooo..o.":
        power = max(power + down, 5.0) if step == "o" else min(power + up, 15.0)
        assert weight.scales(step) == [power]


# the scale is 2^8 to begin with, a window 3 steps
@pytest.mark.parametrize(
    ("hysteresis", "steps", "powers"),
    [
        # tolerated once; used up, each overflow backs off
        (2, "o o o", [8, 7, 6]),
        # a clean window brings the tolerance back, however it was used up
        (2, "oo ... o o", [8, 7, 7, 7, 8, 8, 7]),
        (2, "oooo ... o o", [8, 7, 6, 5, 5, 5, 6, 6, 5]),
        (3, "oooo ... oo o", [8, 8, 7, 6, 6, 6, 7, 7, 7, 6]),
        # a window that an overflow cuts short does not
        (2, "oo .. o ... o", [8, 7, 7, 7, 6, 6, 6, 7, 7]),
        # nor does it have to be the one that follows at once
        (2, "o . o .. o ... o", [8, 8, 7, 7, 7, 6, 6, 6, 7, 7]),
        # at the ceiling of 2^9 nothing grows, and the tolerance comes back all the same
        (2, "... o ... o ... o o", [8, 8, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 8]),
    ],
)
def test_hysteresis_comes_back(hysteresis, steps, powers):
    settings = {"init_scale": 2.0**8, "max_scale": 2.0**9, "growth_interval": 3}
    assert Weight(scaler_of(hysteresis=hysteresis, **settings)).scales(steps) == powers


@pytest.mark.parametrize("interval", [1, 2, 3, 7])
def test_the_scale_grows_on_time(interval):
    # the loss after `interval` clean steps is the first to carry the larger scale
    weight = Weight(scaler_of(growth_interval=interval, init_scale=2.0**8))
    applied = [math.log2(weight.step().loss_scale.item()) for _ in range(3 * interval + 1)]
    assert applied == [8.0 + step // interval for step in range(3 * interval + 1)]
    # and after an overflow the window begins anew
    weight.step(overflows=True)
    power = math.log2(weight.scaler.loss_scale.item())
    assert weight.scales("." * interval) == [power] * (interval - 1) + [power + 1]


@pytest.mark.parametrize("magnitude", [1.0, 3.0, 6e4, 2.0**-24])
def test_a_float16_loss_does_not_overflow_at_the_default(magnitude):
    loss = torch.tensor([magnitude], dtype=torch.float16)
    scaled = dt.LossScaler("fp16").scale(loss)
    assert scaled.dtype == torch.float32
    assert scaled.item() == loss.item() * 2.0**16


def test_the_gradient_of_a_float16_loss_costs_one_step():
    # autograd gives an FP16 loss an FP16 gradient, which is the scale itself, and 2^16 is none
    weight = Weight(dt.LossScaler("fp16"), lr=1.0)
    for skipped in (True, False, False):
        weight.scaler.backward(weight.value.sum().half())
        assert weight.scaler.step(weight.optimizer).skipped.item() == skipped
        weight.optimizer.zero_grad()
    assert weight.scaler.loss_scale.item() == 4.0**2
    assert weight.value.tolist() == [-2.0, -2.0]


def test_calibration_from_2_to_the_32_finds_half_of_the_largest_scale_and_skips_two_steps():
    torch.manual_seed(0)
    model = dt.cast(nn.Linear(4, 1, bias=False), "fp16")
    optimizer, scaler = dt.SGD(model.parameters(), lr=0.5), dt.LossScaler("fp16", init_scale=2.0**32)
    start = dt.master_weights(model)["weight"]
    skipped = []
    for step in range(25):
        before = dt.master_weights(model)["weight"]
        scaler.backward(model(torch.ones(1, 4)).sum())
        report = scaler.step(optimizer)
        optimizer.zero_grad()
        if report.skipped.item():
            skipped.append(step)
            assert torch.equal(dt.master_weights(model)["weight"], before)
    # from 1 by steps of 4: a gradient of 1 times 2^15 is the largest power of two in FP16, and 2^14 half of it
    assert (skipped, scaler.loss_scale.item()) == ([0, 9], 2.0**14)
    assert torch.allclose(dt.master_weights(model)["weight"], start - 23 * 0.5)


def test_the_defaults_are_those_of_the_table():
    assert dt.LossScaler("fp16").settings == LossScale(2.0**16, 2.0, 0.5, 2000, 1, 1.0, 2.0**32)
