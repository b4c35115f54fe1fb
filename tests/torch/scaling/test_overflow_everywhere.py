"""An overflow in every step, parameter and micro-batch: nothing of that step remains, and every other step happens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.loss_scale import LossScale, LossScaleState, init_state, update
from duotone.torch.scaling.step import StepReport

from ..optim.bits import bits_of, everything_of

STEPS, MICRO_BATCHES, PARAMETERS = 5, 2, 4
# the scale moves both ways within five steps
SETTINGS = LossScale(init_scale=2.0**6, growth_interval=2)
VALUES = (math.inf, -math.inf, math.nan)
# what begins at one
PRODUCTS = ("beta_products", "mu_product")

Build = Callable[[Any], torch.optim.Optimizer]

# under fp16 two of the parameters are FP16 with tails and two FP32; under fp16-mixed all are FP32
KINDS: dict[str, tuple[str, Build]] = {
    "AdamW": ("fp16", partial(dt.AdamW, lr=1e-2)),
    "SGD": ("fp16", partial(dt.SGD, lr=1e-2, momentum=0.9)),
    "Lion": ("fp16", partial(dt.Lion, lr=1e-2)),
    "MasterWeights(NAdam)": ("fp16", lambda params: dt.MasterWeights(torch.optim.NAdam(params, lr=1e-2))),
    "MasterWeights(fused AdamW)": (
        "fp16",
        lambda params: dt.MasterWeights(torch.optim.AdamW(params, lr=1e-2, fused=True)),
    ),
    "torch AdamW": ("fp16-mixed", partial(torch.optim.AdamW, lr=1e-2)),
    "torch AdamW foreach": ("fp16-mixed", partial(torch.optim.AdamW, lr=1e-2, foreach=True)),
    "torch AdamW fused": ("fp16-mixed", partial(torch.optim.AdamW, lr=1e-2, fused=True)),
    "torch SGD": ("fp16-mixed", partial(torch.optim.SGD, lr=1e-2, momentum=0.9)),
    "torch SGD foreach": ("fp16-mixed", partial(torch.optim.SGD, lr=1e-2, momentum=0.9, foreach=True)),
    "torch SGD fused": ("fp16-mixed", partial(torch.optim.SGD, lr=1e-2, momentum=0.9, fused=True)),
}
PAIRS = [("AdamW", "MasterWeights(NAdam)"), ("SGD", "Lion"), ("torch AdamW fused", "torch SGD")]


class Overflow(NamedTuple):
    """Where a gradient is spoilt, and by what."""

    parameter: int
    micro_batch: int
    value: float


class Run:
    """A few parameters in training, each with gradients that depend on all the others."""

    def __init__(self, *kinds: str) -> None:
        torch.manual_seed(0)
        policy, builds = KINDS[kinds[0]][0], [KINDS[kind][1] for kind in kinds]
        model = dt.cast(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), policy)
        self.parameters = list(model.parameters())
        assert len(self.parameters) == PARAMETERS
        share = PARAMETERS // len(builds)
        self.optimizers = [build(self.parameters[i * share :][:share]) for i, build in enumerate(builds)]
        self.schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in self.optimizers]
        self.scaler = dt.LossScaler(SETTINGS, patience=None)

    def backward(self, step: int, overflow: Overflow | None = None) -> None:
        generator = torch.Generator().manual_seed(step)
        for micro_batch in range(MICRO_BATCHES):
            inputs = [torch.randn(each.shape, generator=generator) for each in self.parameters]
            products = [(each.float() * x).sum() for each, x in zip(self.parameters, inputs, strict=True)]
            self.scaler.backward((torch.stack(products).sum() - 1.0).square() / MICRO_BATCHES)
            if overflow is not None and overflow.micro_batch == micro_batch:
                grad = self.parameters[overflow.parameter].grad
                assert grad is not None
                grad.view(-1)[step % grad.numel()] = overflow.value

    def step(self, step: int, overflow: Overflow | None = None, ahead: bool = False) -> StepReport:
        self.backward(step, overflow)
        if ahead:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        report = self.scaler.step(*self.optimizers, clip_norm=0.5, scheduler=self.schedulers)
        self.zero_grad()
        return report

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def leave_out(self) -> None:
        """Let the scale alone react to an overflow."""
        packed = self.scaler.state_dict()
        after = update(SETTINGS, LossScaleState(**packed["state"]), True)
        self.scaler.load_state_dict({**packed, "state": asdict(after)})

    def bits(self) -> list[Any]:
        return [[everything_of(each) for each in self.optimizers], [each.last_epoch for each in self.schedulers]]

    def scale_state(self) -> dict[str, Any]:
        return self.scaler.state_dict()["state"]


def held(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """Return the bits of everything that has begun: a skipped first step may make state, but not fill it."""
    tensors = {
        (index, name): value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if (value - (1 if name in PRODUCTS else 0)).any()
    }
    groups = optimizer.param_groups
    weights = [param.detach() for group in groups for param in group["params"]]
    settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    return {"weights": bits_of(weights), "settings": settings, **bits_of(tensors)}


def trajectory(bad_step: int) -> list[float]:
    """Return the scale before each step, and after the last."""
    state, scales = init_state(SETTINGS), []
    for step in range(STEPS):
        scales.append(state.scale)
        state = update(SETTINGS, state, step == bad_step)
    return [*scales, state.scale]


def left_out(kind: str, bad_step: int) -> Run:
    expected = Run(kind)
    for step in range(STEPS):
        if step == bad_step:
            expected.leave_out()
        else:
            expected.step(step)
    return expected


def check(kind: str, bad_step: int, places: Sequence[Overflow], expected: Run) -> None:
    run = Run(kind)
    for step in range(bad_step):
        run.step(step)
    scales = trajectory(bad_step)
    before, scale_before = held(run.optimizers[0]), run.scaler.state_dict()
    for place in places:
        run.scaler.load_state_dict(scale_before)
        report = run.step(bad_step, place, ahead=place.parameter % 2 == bad_step % 2)
        assert report.skipped.item(), place
        assert not report.grad_norm.isfinite().item()
        assert report.loss_scale.item() == scales[bad_step]
        assert run.scaler.loss_scale.item() == scales[bad_step + 1]
        assert held(run.optimizers[0]) == before, place
        assert run.schedulers[0].last_epoch == bad_step
    for step in range(bad_step + 1, STEPS):
        before = held(run.optimizers[0])
        report = run.step(step)
        assert not report.skipped.item()
        assert report.grad_norm.isfinite().item()
        assert report.loss_scale.item() == scales[step]
        assert held(run.optimizers[0])["weights"] != before["weights"]
    assert run.scaler.skipped.item() == 1
    assert run.scale_state() == expected.scale_state()
    assert run.bits() == expected.bits(), places


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("bad_step", range(STEPS))
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_if_the_step_had_been_left_out(kind, bad_step):
    places = product(range(PARAMETERS), range(MICRO_BATCHES))
    overflows = [Overflow(*place, VALUES[(number + bad_step) % 3]) for number, place in enumerate(places)]
    check(kind, bad_step, overflows, left_out(kind, bad_step))


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("bad_step", range(STEPS))
@pytest.mark.parametrize("kind", KINDS)
def test_each_place_and_value_by_itself(kind, bad_step):
    expected = left_out(kind, bad_step)
    for place in product(range(PARAMETERS), range(MICRO_BATCHES), VALUES):
        check(kind, bad_step, [Overflow(*place)], expected)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("pair", PAIRS)
def test_of_two_optimizers_only_the_one_that_overflows_skips(pair):
    share = PARAMETERS // len(pair)
    for bad_step, bad in product(range(STEPS), range(len(pair))):
        good = 1 - bad
        expected, run = Run(*pair), Run(*pair)
        place = Overflow(bad * share + bad_step % share, bad_step % MICRO_BATCHES, VALUES[(bad_step + bad) % 3])
        for step in range(STEPS):
            if step != bad_step:
                expected.step(step)
                assert not run.step(step).skipped.item()
                continue
            scale_before = expected.scaler.state_dict()
            expected.backward(step)
            expected.scaler.step(expected.optimizers[good], clip_norm=0.5, scheduler=expected.schedulers[good])
            expected.zero_grad()
            # one update of the scale for both
            expected.scaler.load_state_dict(scale_before)
            expected.leave_out()

            before = [held(optimizer) for optimizer in run.optimizers]
            report = run.step(step, place, ahead=bad_step % 2 == 1)
            after = [held(optimizer) for optimizer in run.optimizers]
            assert report.skipped.item()
            assert [each.item() for each in report.skipped_each] == [bad == 0, bad == 1]
            assert after[bad] == before[bad]
            assert after[good]["weights"] != before[good]["weights"]
            assert run.schedulers[bad].last_epoch == step
            assert run.schedulers[good].last_epoch == step + 1
        assert run.bits() == expected.bits(), place
        assert run.scale_state() == expected.scale_state()


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_that_user_code_repairs_ahead_of_the_step_still_skips(kind):
    run = Run(kind)
    run.step(0)
    before = held(run.optimizers[0])
    for parameter in range(PARAMETERS):
        run.backward(1, Overflow(parameter, 0, math.inf))
        run.scaler.unscale_(run.optimizers[0])
        for each in run.parameters:
            assert each.grad is not None
            each.grad.nan_to_num_(0.0, 0.0, 0.0)
        report = run.scaler.step(*run.optimizers, scheduler=run.schedulers)
        run.zero_grad()
        assert report.skipped.item()
        assert held(run.optimizers[0]) == before
    assert run.scaler.skipped.item() == PARAMETERS


@pytest.mark.parametrize("kind", KINDS)
def test_overflows_in_a_row_leave_nothing_behind_either(kind):
    # from 64 to the floor, and beyond it
    expected, run = (Run(kind) for _ in range(2))
    for step in range(STEPS):
        for parameter in range(PARAMETERS):
            expected.leave_out()
            before = held(run.optimizers[0])
            assert run.step(step, Overflow(parameter, 1, VALUES[parameter % 3])).skipped.item()
            assert held(run.optimizers[0]) == before
        expected.step(step)
        assert not run.step(step).skipped.item()
    assert run.bits() == expected.bits()
    assert run.scale_state() == expected.scale_state()
