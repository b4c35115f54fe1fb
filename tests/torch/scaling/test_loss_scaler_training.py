"""Whole training steps through real optimizers: several losses and optimizers, penalties, closures, and saving."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import LossScaleError, OptimizerError
from duotone.loss_scale import LossScale

from .settled import settled

pytestmark = pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")

OPTIMIZERS = {
    "duotone": lambda params: dt.AdamW(params, lr=0.1),
    "wrapped": lambda params: dt.MasterWeights(torch.optim.NAdam(params, lr=0.1)),
    "plain": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=False),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
}

# settings, steps (o overflows, . does not), and the power of two of the scale in each
TRAJECTORIES = [
    (LossScale(2.0**4, growth_interval=2), "o..o.....", [4, 3, 3, 4, 3, 3, 4, 4, 5]),
    (LossScale(2.0**4, 4.0, 0.25, growth_interval=1), ".o.oo..", [4, 6, 4, 6, 4, 2, 4]),
    (LossScale(2.0**4, growth_interval=3, hysteresis=2), "oo.o...oo", [4, 4, 3, 3, 2, 2, 2, 3, 3]),
    (LossScale(2.0**4, growth_interval=1, max_scale=2.0**5), "....o.", [4, 5, 5, 5, 5, 4]),
    (LossScale(2.0**1, min_scale=2.0**0, growth_interval=2), "o.o..o.o", [1, 0, 0, 0, 0, 1, 0, 0]),
    (LossScale.static(2.0**7), ".oo.", [7, 7, 7, 7]),
    (LossScale.none(), ".oo.", [0, 0, 0, 0]),
    (LossScale(2.0**4, growth_factor=1.0), "..oo..", [4, 4, 4, 3, 2, 2]),
    (LossScale(2.0**4, backoff_factor=1.0, growth_interval=2), "oo..o", [4, 4, 4, 4, 5]),
]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("settings", "steps", "powers"), TRAJECTORIES)
def test_trajectories(kind, settings, steps, powers):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer, scaler = OPTIMIZERS[kind]([parameter]), settled(dt.LossScaler(settings))
    applied = []
    for step in steps:
        before = parameter.detach().clone()
        scaler.backward(parameter.sum() * (math.inf if step == "o" else 1.0) if step == "." else overflow(parameter))
        report = scaler.step(optimizer)
        optimizer.zero_grad()
        applied.append(math.log2(report.loss_scale.item()))
        assert torch.equal(before, parameter) == report.skipped.item() == (step == "o")
    assert applied == powers
    assert scaler.skipped.item() == steps.count("o")


class Overflow(torch.autograd.Function):
    """Is 0, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return (grad * math.inf).expand(2)


def overflow(parameter):
    return Overflow.apply(parameter)


@pytest.mark.parametrize("kinds", [("duotone", "plain"), ("fused", "wrapped"), ("plain", "fused")])
def test_an_overflow_anywhere_skips_its_own_optimizer_alone(kinds):
    # step, optimizer, parameter and micro-batch that overflow
    for at in itertools.product(range(2), range(2), range(2), range(2)):
        params = [[nn.Parameter(torch.ones(2)) for _ in range(2)] for _ in range(2)]
        optimizers = [OPTIMIZERS[kind](each) for kind, each in zip(kinds, params, strict=True)]
        scaler = settled(dt.LossScaler("fp16"))
        for step in range(2):
            for micro_batch in range(2):
                losses = [
                    overflow(param) if (step, owner, index, micro_batch) == at else param.square().mean()
                    for owner, each in enumerate(params)
                    for index, param in enumerate(each)
                ]
                # the loss of each optimizer is scaled for itself
                scaler.backward(losses[0] + losses[1])
                scaler.backward(losses[2] + losses[3])
            before = [torch.stack(each).detach().clone() for each in params]
            report = scaler.step(*optimizers)
            skipped = [step == at[0] and owner == at[1] for owner in range(2)]
            assert [flag.item() for flag in report.skipped_each] == skipped
            assert [torch.equal(a, torch.stack(b)) for a, b in zip(before, params, strict=True)] == skipped
            for optimizer in optimizers:
                optimizer.zero_grad()
        assert (scaler.skipped.item(), scaler.loss_scale.item()) == (1, 2.0**15)


def test_accumulation_is_the_sum_of_the_true_gradients():
    torch.manual_seed(0)
    model, data = nn.Linear(4, 1), torch.randn(4, 8, 4)
    optimizer, scaler = dt.SGD(model.parameters(), lr=1.0), dt.LossScaler("fp16", init_scale=2.0**8)
    expected = model.weight.detach() - torch.autograd.grad(model(data).square().mean(), model.weight)[0]
    for micro_batch in data:
        scaler.backward(model(micro_batch).square().mean() / 4)
    scaler.step(optimizer)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_gradient_penalty_by_double_backward(ahead):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(6, 4)

    def loss_with_penalty(model, data, scale, unscale):
        loss = model(data).square().mean()
        grads = torch.autograd.grad(scale(loss), list(model.parameters()), create_graph=True)
        return loss + sum(unscale(grad).square().sum() for grad in grads).sqrt()

    exact = copy.deepcopy(model).double()
    true = torch.autograd.grad(
        loss_with_penalty(exact, data.double(), lambda loss: loss, lambda grad: grad), list(exact.parameters())
    )
    optimizer, scaler = dt.SGD(model.parameters(), lr=1.0), dt.LossScaler("fp16", init_scale=2.0**10)
    inverse = scaler.loss_scale.reciprocal()
    scaler.backward(loss_with_penalty(model, data, scaler.scale, lambda grad: grad * inverse))
    if ahead:
        scaler.unscale_(optimizer)
    report = scaler.step(optimizer)
    norm = sum(grad.square().sum() for grad in true).sqrt().item()
    assert report.grad_norm.item() == pytest.approx(norm, rel=1e-5)
    for param, before, grad in zip(model.parameters(), exact.parameters(), true, strict=True):
        torch.testing.assert_close(param.detach(), (before.detach() - grad).float(), rtol=1e-5, atol=1e-6)


def test_a_gradient_penalty_that_overflows_backs_off():
    weight, data = nn.Parameter(torch.ones(4, dtype=torch.float16)), torch.full((4,), 8.0, dtype=torch.float16)
    optimizer, scaler = dt.SGD([weight], lr=0.0), dt.LossScaler("fp16")
    skipped = []
    for _ in range(6):
        point = data.clone().requires_grad_()
        (grad,) = torch.autograd.grad(scaler.scale((point * weight).sum()), point, create_graph=True)
        scaler.backward((grad.float() / scaler.loss_scale).norm())
        skipped.append(scaler.step(optimizer).skipped.item())
        optimizer.zero_grad()
    assert skipped == [True, False, False, False, False, False]
    assert scaler.loss_scale.item() == 4.0**5


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_closure_is_called_once_with_gradients_enabled(kind):
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = OPTIMIZERS[kind]([parameter]), dt.LossScaler("fp16")
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        scaler.backward(parameter.square().sum())

    with torch.no_grad():
        report = scaler.step(optimizer, closure=closure, clip_norm=1.0)
        assert not torch.is_grad_enabled()
    assert calls == [True]
    assert report.grad_norm.item() == pytest.approx(math.sqrt(8.0))
    assert (parameter < 1).all()
    scaler.step(optimizer, closure=closure)
    assert calls == [True, True]


def test_what_a_step_cannot_take_is_refused_before_anything_moves():
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = dt.SGD([parameter], lr=1.0), dt.LossScaler("fp16")
    scaler.backward(parameter.sum())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    refused = [
        ((torch.optim.LBFGS([parameter]),), {}, "LBFGS evaluates the loss several times"),
        ((optimizer, optimizer), {}, "an optimizer was given twice; give each once"),
        ((optimizer, lambda: None), {}, "step takes optimizers, but one is a function; give a closure as closure="),
        (([optimizer],), {}, "one is a list; .* and several optimizers one after the other"),
        ((optimizer,), {"scheduler": [plateau]}, "ReduceLROnPlateau advances by a metric"),
    ]
    for optimizers, options, text in refused:
        with pytest.raises(OptimizerError, match=text):
            scaler.step(*optimizers, **options)
        assert parameter.tolist() == [1.0, 1.0]
    assert not scaler.step(optimizer).skipped.item()
    assert parameter.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_iteration_without_gradients_is_a_clean_no_op(kind):
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = OPTIMIZERS[kind]([parameter]), dt.LossScaler("fp16", growth_interval=2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler.backward(parameter.sum())
    scaler.step(optimizer, scheduler=scheduler)
    optimizer.zero_grad()
    before = scaler.state_dict(), parameter.tolist(), copy.deepcopy(optimizer.state_dict()), scheduler.last_epoch
    scaler.backward(nn.Parameter(torch.ones(1)).sum() * math.nan)
    scaler.unscale_(optimizer)
    report = scaler.step(optimizer, scheduler=scheduler, clip_norm=1.0)
    assert (report.skipped.item(), report.grad_norm.item()) == (False, 0.0)
    assert [flag.item() for flag in report.skipped_each] == [False]
    after = scaler.state_dict(), parameter.tolist(), optimizer.state_dict(), scheduler.last_epoch
    assert repr(before) == repr(after)
    # what was scaled is of no use to gradients that come later
    parameter.grad = torch.ones(2)
    with pytest.raises(LossScaleError, match="no loss was scaled"):
        scaler.step(optimizer)
    scaler.scale(torch.ones(()))
    assert not scaler.step(optimizer).skipped.item()
    assert scaler.loss_scale.item() == 2.0**17


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam])
@pytest.mark.parametrize("builds_first", [True, False])
@pytest.mark.parametrize("resumes", [False, True])
def test_a_scheduler_built_before_or_after_preparing(kind, builds_first, resumes):
    model = nn.Linear(2, 1)
    first = kind(model.parameters(), lr=1.0)
    early = torch.optim.lr_scheduler.StepLR(first, 1, gamma=0.5) if builds_first else None
    model, optimizer, scaler = dt.prepare(model, first, "bf16")
    scheduler = early or torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rates = []
    for number in range(4):
        if resumes and number == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        rates.append(optimizer.param_groups[0]["lr"])
        model(torch.ones(1, 2)).sum().backward()
        if number == 1:
            model.weight.grad.fill_(math.inf)
        scaler.step(optimizer, scheduler=scheduler)
        optimizer.zero_grad()
    assert rates == [1.0, 0.5, 0.5, 0.25]


def test_a_scheduler_of_another_optimizer_is_named(same_bits):
    weight = nn.Parameter(torch.ones(2))
    optimizer, other = dt.SGD([weight], lr=1.0), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(other, 1)
    weight.grad = torch.ones(2)
    with pytest.raises(OptimizerError, match=r"StepLR changes the learning rate of an SGD that is not among"):
        dt.LossScaler("bf16").step(optimizer, scheduler=scheduler)
    assert same_bits(weight, torch.ones(2))


def test_an_optimizer_left_out_of_the_step_is_named():
    weights = [nn.Parameter(torch.ones(2, dtype=torch.float16)) for _ in range(2)]
    first, second = (dt.SGD([weight], lr=1.0) for weight in weights)
    scaler = dt.LossScaler("fp16")
    scaler.backward(sum(weight.float().sum() for weight in weights))
    scaler.unscale_(first)
    with pytest.raises(LossScaleError, match="unscale_ was called for an optimizer that is not among these"):
        scaler.step(second)
    assert weights[0].grad.dtype == torch.float32
    scaler.step(first, second)
    assert [weight.grad.dtype for weight in weights] == [torch.float16] * 2


def test_a_state_that_is_loaded_before_the_step_leaves_no_loss_to_step_with():
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = dt.SGD([weight], lr=1.0), dt.LossScaler("fp16")
    scaler.backward(weight.sum())
    scaler.load_state_dict(dt.LossScaler("fp16", init_scale=4.0).state_dict())
    with pytest.raises(LossScaleError, match="no loss was scaled"):
        scaler.step(optimizer)


def test_float16_gradients_that_would_underflow_in_a_torch_optimizer_are_refused():
    model = dt.cast(nn.Linear(2, 1), "fp16-true,rounding=nearest")
    plain = torch.optim.AdamW(model.parameters(), foreach=False)
    scaler = dt.LossScaler("fp16", init_scale=2.0**8)
    scaler.backward(model(torch.ones(1, 2)).sum())
    with pytest.raises(OptimizerError, match="true gradients underflow in FP16, and this AdamW takes no others"):
        scaler.step(plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("kind", ["duotone", "wrapped"])
@pytest.mark.parametrize("between", [False, True])
def test_a_copy_in_mid_run_goes_on_with_the_same_bits(copied, kind, between, same_bits):
    torch.manual_seed(0)
    model = dt.cast(nn.Linear(3, 2), "fp16")
    optimizer, scaler = OPTIMIZERS[kind](model.parameters()), dt.LossScaler("fp16", growth_interval=2)
    runs = [(model, optimizer, scaler)]
    data = torch.randn(6, 4, 3)
    for number, batch in enumerate(data):
        for each_model, _, each_scaler in runs:
            each_scaler.backward(each_model(batch).square().mean() * (1e4 if number in (1, 4) else 0.01))
        if between and number == 2:
            runs.append(copied(runs[0]))
            # torch copies and pickles parameters without their gradients
            for param, twin in zip(model.parameters(), runs[1][0].parameters(), strict=True):
                twin.grad = param.grad.clone()
        for _, each_optimizer, each_scaler in runs:
            each_scaler.step(each_optimizer, clip_norm=1.0)
            each_optimizer.zero_grad()
        if not between and number == 2:
            runs.append(copied(runs[0]))
    first, second = runs
    assert first[2].skipped.item() > 1
    assert first[2].state_dict() == second[2].state_dict()
    masters = [dt.master_weights(each).values() for each in (first[0], second[0])]
    assert all(itertools.starmap(same_bits, zip(*masters, strict=True)))
    assert not same_bits(first[0].weight, dt.cast(nn.Linear(3, 2), "fp16").weight)


def test_a_process_group_is_not_copied():
    scaler = dt.LossScaler("fp16")
    scaler.process_group = object()
    assert copy.deepcopy(scaler).process_group is None
    assert pickle.loads(pickle.dumps(scaler)).process_group is None
    assert scaler.process_group is not None


def test_a_state_counts_steps_and_older_ones_are_read():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer, scaler = dt.SGD([parameter], lr=0.0), dt.LossScaler("fp16")
    for _ in range(3):
        scaler.backward(parameter.sum())
        scaler.step(optimizer)
    state = scaler.state_dict()
    assert state["steps"] == 3
    older = {name: value for name, value in state.items() if name != "steps"}
    for saved, step in ((state, 4), (older, 1)):
        other = dt.LossScaler("fp16")
        other.load_state_dict(saved)
        other.backward((parameter * math.nan).sum())
        with pytest.warns(match=f"loss 1 of step {step} is not finite"):
            other.step(optimizer)
