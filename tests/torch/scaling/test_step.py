"""One step: the norm and the flag, clipping by the true norm, skipping, and torch's own optimizers."""

import math

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError

from .settled import settled

BIG = 2.0**16


@pytest.fixture
def scaler():
    """Return a scaler at 2^16 for which a loss was scaled, as if its gradients were there."""
    made = settled(dt.LossScaler("fp16"))
    made.scale(torch.ones(()))
    return made


def parameter_with(grad: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(grad))
    parameter.grad = grad
    return parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_norm_is_that_of_the_true_gradient(scaler, dtype):
    torch.manual_seed(0)
    parameters = [parameter_with(torch.randn(shape).to(dtype)) for shape in ((7, 5), (), (0,), (33,))]
    expected = math.sqrt(sum((p.grad.double() / BIG).square().sum().item() for p in parameters))
    report = scaler.step(dt.SGD(parameters, lr=0.0))
    assert report.grad_norm.item() == pytest.approx(expected, rel=1e-6)
    assert report.grad_norm.dtype == torch.float32


def test_a_norm_below_the_limit_is_not_clipped(scaler):
    # torch.amp without unscale_ compares the limit with the scaled norm and applies 1.5e-5 here
    parameter = parameter_with(torch.tensor([0.2 * BIG]))
    report = scaler.step(dt.SGD([parameter], lr=1.0), clip_norm=1.0)
    assert parameter.item() == pytest.approx(-0.2)
    assert report.grad_norm.item() == pytest.approx(0.2)


def test_a_norm_above_the_limit_is_clipped_to_it(scaler):
    parameter = parameter_with(torch.tensor([3.0, 4.0]) * BIG)
    report = scaler.step(dt.SGD([parameter], lr=1.0), clip_norm=1.0)
    assert parameter.tolist() == pytest.approx([-0.6, -0.8])
    assert report.grad_norm.item() == pytest.approx(5.0)


def test_gradients_are_left_as_they_are(scaler):
    grad = torch.tensor([3.0, 4.0]) * BIG
    parameter = parameter_with(grad.clone())
    scaler.step(dt.SGD([parameter], lr=1.0), clip_norm=1.0)
    assert torch.equal(parameter.grad, grad)


def test_all_zero_gradients_are_fine_with_clipping(scaler):
    parameter = parameter_with(torch.zeros(3))
    report = scaler.step(dt.SGD([parameter], lr=1.0), clip_norm=1.0)
    assert not parameter.any()
    assert not report.skipped.item()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", [0, 50, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_non_finite_gradient_anywhere_skips(scaler, bad, position, dtype):
    flat = torch.ones(101, dtype=dtype)
    flat[position] = bad
    parameters = [parameter_with(torch.ones(4, dtype=dtype)), parameter_with(flat)]
    report = scaler.step(dt.AdamW(parameters, lr=1.0), clip_norm=1.0)
    assert report.skipped.item()
    assert not math.isfinite(report.grad_norm.item())
    assert not any(parameter.any() for parameter in parameters)


def test_finite_gradients_whose_squares_overflow_are_no_overflow(scaler):
    parameter = parameter_with(torch.full((4,), 3e38))
    report = scaler.step(dt.SGD([parameter], lr=1.0), clip_norm=1.0)
    assert not report.skipped.item()
    assert report.grad_norm.item() == pytest.approx(6e38 / BIG, rel=1e-6)
    assert parameter.tolist() == pytest.approx([-0.5] * 4)


@pytest.mark.parametrize("overflows_first", [True, False])
def test_only_the_optimizer_that_overflowed_skips(scaler, overflows_first):
    good, bad = parameter_with(torch.ones(2) * BIG), parameter_with(torch.tensor([1.0, math.inf]))
    optimizers = [dt.SGD([good], lr=1.0), dt.SGD([bad], lr=1.0)]
    report = scaler.step(*optimizers[:: -1 if overflows_first else 1])
    assert good.tolist() == [-1.0, -1.0]
    assert bad.tolist() == [0.0, 0.0]
    assert report.skipped.item()
    # one update of the scale for the whole step
    assert scaler.loss_scale.item() == BIG / 2
    assert scaler.skipped.item() == 1


def test_torchs_optimizers_may_have_float64_weights(scaler):
    parameter = parameter_with(torch.tensor([3.0, 4.0], dtype=torch.float64) * BIG)
    report = scaler.step(torch.optim.SGD([parameter], lr=1.0), clip_norm=1.0)
    assert report.grad_norm.item() == pytest.approx(5.0)
    assert parameter.tolist() == pytest.approx([-0.6, -0.8])


def test_a_gradient_that_no_kernel_reads_is_named(scaler):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad_dtype = torch.float64
    parameter.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(OptimizerError, match=r"takes gradients in float32, .* not torch.float64; set .* grad_dtype"):
        dt.AdamW([parameter]).step()
    scaler.scale(torch.ones(()))
    with pytest.raises(OptimizerError, match=r"a gradient is in torch.float64; allowed are"):
        scaler.step(dt.AdamW([parameter]))


def test_an_overflow_in_one_group_stops_all_groups_of_its_optimizer(scaler):
    first, second = parameter_with(torch.ones(3) * BIG), parameter_with(torch.ones(2) * BIG)
    optimizer = dt.AdamW([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.5)
    for bad in (second, first, second):
        grad, bad.grad = bad.grad, torch.full_like(bad.grad, math.inf)
        scaler.scale(torch.ones(()))
        assert scaler.step(optimizer).skipped.item()
        assert not first.any()
        assert not second.any()
        assert not any(state["step"].item() for state in optimizer.state.values())
        bad.grad = grad * scaler.loss_scale / BIG
    # bias correction begins with the first step that was taken: one of AdamW's first steps has the size of lr
    for parameter in (first, second):
        parameter.grad = torch.ones_like(parameter) * scaler.loss_scale
    scaler.scale(torch.ones(()))
    assert not scaler.step(optimizer).skipped.item()
    assert first.tolist() == pytest.approx([-0.5] * 3)
    assert second.tolist() == pytest.approx([-0.5] * 2)


def test_each_optimizer_is_clipped_by_its_own_norm(scaler):
    small, large = parameter_with(torch.tensor([0.5]) * BIG), parameter_with(torch.tensor([20.0]) * BIG)
    report = scaler.step(dt.SGD([small], lr=1.0), dt.SGD([large], lr=1.0), clip_norm=1.0)
    assert small.item() == pytest.approx(-0.5)
    assert large.item() == pytest.approx(-1.0)
    assert report.grad_norm.item() == pytest.approx(math.hypot(0.5, 20.0))


def test_a_step_without_gradients_does_nothing():
    scaler = dt.LossScaler("fp16", growth_interval=1)
    parameter = nn.Parameter(torch.ones(2))
    report = scaler.step(dt.AdamW([parameter], lr=1.0), clip_norm=1.0)
    assert (report.skipped.item(), report.grad_norm.item()) == (False, 0.0)
    assert parameter.tolist() == [1.0, 1.0]
    assert scaler.loss_scale.item() == BIG


def test_a_scheduler_waits_for_a_step_that_was_not_skipped():
    scaler = dt.LossScaler("fp16")
    parameter = parameter_with(torch.ones(1))
    optimizer = dt.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = []
    for value in (math.inf, 1.0, math.nan, 1.0):
        parameter.grad = torch.tensor([value])
        scaler.scale(torch.ones(()))
        scaler.step(optimizer, scheduler=scheduler)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_torchs_optimizers_on_float32_weights(options, kind):
    torch.manual_seed(0)
    grads = [torch.randn(5), torch.full((5,), math.inf), torch.randn(5)]
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    our_optimizer, their_optimizer = kind([ours], lr=0.1, **options), kind([theirs], lr=0.1, **options)
    scaler = dt.LossScaler("fp16-mixed", init_scale=2.0**8)
    for grad in grads:
        scale = scaler.scale(torch.ones(())).item()
        ours.grad = grad * scale
        scaler.step(our_optimizer, clip_norm=1.0)
        if grad.isfinite().all():
            theirs.grad = grad.clone()
            nn.utils.clip_grad_norm_([theirs], 1.0)
            their_optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)
    assert scaler.skipped.item() == 1
    assert not hasattr(our_optimizer, "found_inf")


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-true,rounding=stochastic"])
@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_without_masters_is_refused(policy, fused):
    model = dt.cast(nn.Linear(2, 1), policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = dt.LossScaler(policy)
    scaler.backward(model(torch.ones(1, 2)).sum() * 2.0**-16)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(OptimizerError, match=r"torch's AdamW would lose small updates.*duotone\.torch\.prepare"):
        scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", [dt.SGD, torch.optim.SGD])
def test_sparse_gradients_are_refused_before_anything_moves(kind):
    dense, embedding = parameter_with(torch.ones(2)), nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    scaler = dt.LossScaler("bf16")
    with pytest.raises(OptimizerError, match=r"sparse gradients cannot be unscaled here; use Embedding"):
        scaler.step(dt.SGD([dense], lr=1.0), kind(embedding.parameters(), lr=1.0))
    assert not dense.any()


def test_a_wrapper_around_an_optimizer_with_masters_is_named(scaler):
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            super().__init__([param for group in optimizer.param_groups for param in group["params"]], {})
            self.optimizer = optimizer

    model = dt.cast(nn.Linear(2, 1), "fp16")
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(OptimizerError, match=r"a Wrapper hides the AdamW in it, .*; give that one to the step"):
        scaler.step(Wrapper(dt.AdamW(model.parameters())))


def test_named_plain_rounding_may_use_any_optimizer():
    model = dt.cast(nn.Linear(2, 1), "bf16-true,rounding=nearest")
    scaler = dt.LossScaler("bf16")
    scaler.backward(model(torch.ones(1, 2)).sum())
    before = model.weight.detach().clone()
    assert not scaler.step(torch.optim.SGD(model.parameters(), lr=1.0)).skipped.item()
    assert not torch.equal(model.weight, before)


def test_bad_arguments_are_named(scaler):
    optimizer = dt.SGD([parameter_with(torch.ones(1))])
    with pytest.raises(OptimizerError, match="at least one optimizer"):
        scaler.step()
    for clip_norm in (0.0, -1.0, math.nan):
        with pytest.raises(OptimizerError, match=r"clip_norm is .*; it must be positive"):
            scaler.step(optimizer, clip_norm=clip_norm)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("kinds", [(torch.optim.SGD, torch.optim.SGD), (dt.SGD, torch.optim.SGD), (dt.SGD, dt.SGD)])
def test_the_scale_is_taken_out_of_a_gradient_once(kinds, ahead):
    shared, own = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizers = [kinds[0]([shared], lr=1.0), kinds[1]([own, shared], lr=1.0)]
    scaler = dt.LossScaler("fp16")
    scaler.backward(shared.sum() + own.sum())
    for optimizer in optimizers[:ahead]:
        scaler.unscale_(optimizer)
    if kinds == (dt.SGD, dt.SGD) and not ahead:
        scaler.step(*optimizers)
        assert (shared.item(), own.item()) == (-2.0, -1.0)
    else:
        with pytest.raises(OptimizerError, match=r"a weight of shape \(1,\) is in two of these optimizers"):
            scaler.step(*optimizers)
        assert (shared.item(), own.item()) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [complex(1.0, math.inf), complex(math.nan, 1.0), None])
def test_complex_gradients_are_read_with_both_parts(scaler, bad):
    parameter = parameter_with(torch.tensor([3.0 + 4.0j]) * BIG if bad is None else torch.tensor([bad]))
    report = scaler.step(torch.optim.SGD([parameter], lr=1.0), clip_norm=1.0)
    assert report.skipped.item() == (bad is not None)
    if bad is None:
        assert report.grad_norm.item() == 5.0
        torch.testing.assert_close(parameter.detach(), torch.tensor([-0.6 - 0.8j]))
    else:
        assert parameter.item() == 0.0


def test_gradients_on_several_devices_are_refused(scaler):
    here, there = parameter_with(torch.ones(1)), parameter_with(torch.ones(1, device="meta"))
    for optimizers in ([dt.SGD([here, there], lr=1.0)], [dt.SGD([each], lr=1.0) for each in (here, there)]):
        with pytest.raises(OptimizerError, match="gradients lie on cpu and on meta, but one step reads those of one"):
            scaler.step(*optimizers)
    assert here.item() == 0.0
