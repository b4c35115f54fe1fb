"""Defects of torch.amp and of 16-bit weights in torch, each beside what happens here.

Every test shows Duotone's behaviour first, then torch's defect. Where a later torch has mended it, that half is
skipped, and the comparison may go.
"""

import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import LossScaleCollapse, LossScaleError, OptimizerError

BIG = 2.0**16
# the release that the defects were seen in
SEEN_IN = (2, 13)


def torch_has_it(defect: bool) -> None:
    """Assert a defect of torch; skip if a later one has mended it."""
    if not defect and torch.__version__ >= (SEEN_IN[0], SEEN_IN[1] + 1):
        pytest.skip(f"torch {torch.__version__} has mended this")
    assert defect


def torch_scaler(init_scale: float = BIG) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    scaler.scale(torch.ones(()))
    return scaler


def our_scaler(**settings: Any) -> dt.LossScaler:
    scaler = dt.LossScaler("fp16", **settings)
    scaler.scale(torch.ones(()))
    return scaler


def weight_with(grad: Iterable[float] | float, dtype: torch.dtype = torch.float32, fill: float = 0.0) -> nn.Parameter:
    values = torch.as_tensor(grad, dtype=dtype)
    weight = nn.Parameter(torch.full_like(values, fill))
    weight.grad = values
    return weight


def message_of(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """Return what a call says when it raises, and nothing if it does not."""
    try:
        function(*arguments, **keywords)
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error)
    return ""


def test_the_scale_has_a_floor():
    weight = nn.Parameter(torch.ones(3))
    optimizer, scaler = dt.AdamW([weight], lr=0.1), dt.LossScaler("fp16", patience=None)
    for _ in range(200):
        scaler.scale(torch.ones(()))
        weight.grad = torch.full((3,), math.inf)
        assert scaler.step(optimizer).skipped.item()
    assert scaler.loss_scale.item() == 1.0
    scaler.scale(torch.ones(()))
    weight.grad = torch.ones(3)
    assert not scaler.step(optimizer).skipped.item()
    assert torch.allclose(weight, torch.tensor(0.9), atol=0.01)

    theirs, plain = torch_scaler(), torch.optim.SGD([weight], lr=0.1)
    for _ in range(200):
        weight.grad = torch.full((3,), math.inf)
        theirs.step(plain)
        theirs.update()
    weight.grad = theirs.scale(torch.ones(3))
    theirs.unscale_(plain)
    torch_has_it(theirs.get_scale() == 0.0 and bool(weight.grad.isnan().all()))


def test_a_collapse_ends_with_names():
    model = dt.cast(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), "fp16")
    optimizer, scaler = dt.AdamW(model.parameters()), dt.LossScaler("fp16")

    def overflowing_step() -> None:
        scaler.backward(model(torch.ones(1, 2)).sum() / BIG)
        model[1].weight.grad.fill_(math.inf)
        scaler.step(optimizer)
        optimizer.zero_grad()

    # at 2^16, and at 1, where one batch alone may be at fault
    for _ in range(2):
        overflowing_step()
    with pytest.raises(LossScaleCollapse, match=r"loss scale 1, its floor: 1 of 4 gradients are not .* \(1\.weight\)"):
        overflowing_step()


@pytest.mark.parametrize("ahead", [True, False])
def test_clipping_sees_the_true_norm(ahead):
    # a norm of 0.2 is below the limit
    weight, scaler = weight_with([0.2 * BIG]), our_scaler()
    optimizer = dt.SGD([weight], lr=1.0)
    if ahead:
        scaler.unscale_(optimizer)
        assert nn.utils.clip_grad_norm_([weight], 1.0).item() == pytest.approx(0.2)
    assert scaler.step(optimizer, clip_norm=1.0).grad_norm.item() == pytest.approx(0.2)
    assert weight.item() == pytest.approx(-0.2)

    weight, theirs = weight_with([0.2 * BIG]), torch_scaler()
    nn.utils.clip_grad_norm_([weight], 1.0)
    theirs.step(torch.optim.SGD([weight], lr=1.0))
    torch_has_it(0.0 < -weight.item() < 2e-5)


def ten_small_steps(
    optimizer: torch.optim.Optimizer, weight: Tensor, step: Callable[[torch.optim.Optimizer], None]
) -> None:
    for _ in range(10):
        weight.grad = torch.full_like(weight, BIG / 64)
        step(optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_float16_weights_are_trained(fused):
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    dt.cast(model, "fp16")
    optimizer, scaler = dt.AdamW([model.weight], lr=1e-5, weight_decay=0.0), dt.LossScaler("fp16")

    def our_step(optimizer: torch.optim.Optimizer) -> None:
        scaler.scale(torch.ones(()))
        assert not scaler.step(optimizer).skipped.item()

    ten_small_steps(optimizer, model.weight, our_step)
    # each step of AdamW under a constant gradient has the size of the learning rate
    assert dt.master_weights(model)["weight"].tolist() == [[pytest.approx(1 - 1e-4, abs=1e-6)] * 4]

    weight, theirs = nn.Parameter(torch.ones(4, dtype=torch.float16)), torch_scaler()
    plain = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.0, fused=fused)

    def their_step(optimizer: torch.optim.Optimizer) -> None:
        theirs.step(optimizer)
        theirs.update()

    message = message_of(ten_small_steps, plain, weight, their_step)
    if fused:
        # taken, and every update lost
        torch_has_it(not message and bool((weight == 1).all()))
    else:
        torch_has_it(message == "Attempting to unscale FP16 gradients.")


def test_a_closure_is_taken_by_name_or_refused():
    weight, scaler = nn.Parameter(torch.zeros(2)), dt.LossScaler("fp16")
    optimizer = dt.SGD([weight], lr=1.0)
    calls = []

    def closure() -> None:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        scaler.backward((weight * torch.tensor([3.0, 4.0])).sum())

    with torch.no_grad():
        report = scaler.step(optimizer, closure=closure, clip_norm=1.0)
    assert calls == [True]
    assert report.grad_norm.item() == pytest.approx(5.0)
    assert weight.tolist() == pytest.approx([-0.6, -0.8])
    with pytest.raises(OptimizerError, match=r"step takes optimizers, but one is a function; give .* closure=\.\.\."):
        scaler.step(optimizer, closure)
    assert calls == [True]

    # by name it is refused, and by place it runs, its gradients scaled or not
    weight, theirs, called = weight_with([BIG]), torch_scaler(), []
    plain = torch.optim.SGD([weight], lr=1.0)
    assert "Closure use is not currently supported" in message_of(theirs.step, plain, closure=lambda: 0.0)
    message_of(theirs.step, plain, lambda: called.append(1))
    torch_has_it(bool(called))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_float16_loss_does_not_overflow(shape):
    loss = torch.full(shape, 1.5, dtype=torch.float16)
    scaler = dt.LossScaler("fp16")
    assert scaler.scale(loss).dtype == torch.float32
    assert scaler.scale(loss).item() == 1.5 * BIG

    scaled = torch_scaler().scale(loss)
    if shape == (1,):
        torch_has_it(scaled.dtype == torch.float16 and bool(scaled.isinf()))


@pytest.mark.parametrize("fused", [False, True])
def test_an_iteration_without_gradients_is_nothing(fused):
    weight = nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    for optimizer in (dt.AdamW([weight], lr=0.1), plain):
        scaler = dt.LossScaler("fp16", growth_interval=1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for prepare in (lambda scaler=scaler: None, lambda scaler=scaler: scaler.scale(torch.ones(()))):
            prepare()
            before = scaler.state_dict()
            report = scaler.step(optimizer, clip_norm=1.0, scheduler=scheduler)
            assert (report.skipped.item(), report.grad_norm.item()) == (False, 0.0)
            assert scaler.state_dict() == before
            assert scheduler.last_epoch == 0
        # the loss that left no gradient is forgotten: nothing is scaled for the next step
        weight.grad = torch.ones(3)
        with pytest.raises(LossScaleError, match="no loss was scaled"):
            scaler.step(optimizer)
        weight.grad = None
    assert weight.tolist() == [1.0] * 3

    theirs = torch_scaler()
    step, update = message_of(theirs.step, plain), message_of(theirs.update)
    torch_has_it(bool(step) == (not fused) and "No inf checks were recorded" in update)


@pytest.mark.parametrize("kind", [dt.AdamW, lambda *a, **k: dt.MasterWeights(torch.optim.AdamW(*a, **k))])
def test_small_updates_of_bfloat16_weights_are_kept(kind):
    class Norm(nn.Module):
        """One of one's own, whose weights are 16-bit like any others."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(768))

    model = dt.cast(Norm(), "bf16")
    scaler, optimizer = dt.LossScaler("bf16"), kind(model.parameters(), lr=1e-4, weight_decay=0.0)
    moved = []
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        scaler.step(optimizer)
        moved.append(1.0 - dt.master_weights(model)["weight"].double())
    expected = 1e-4 * torch.arange(1, 101, dtype=torch.float64)
    assert torch.allclose(torch.stack(moved), expected[:, None].expand(100, 768), rtol=1e-3)
    assert model.weight.dtype == torch.bfloat16
    # 0.99 lies between two BF16 numbers, 0.98828 and 0.99219
    assert (model.weight.double() == 0.98828125).all()

    weight = nn.Parameter(torch.ones(768, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([weight], lr=1e-4)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        plain.step()
    torch_has_it(int((weight != 1).sum()) == 0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_may_be_wider_than_its_weight(dtype, fused):
    def weight_and_gradient() -> nn.Parameter:
        weight = nn.Parameter(torch.ones(3, dtype=dtype))
        weight.grad_dtype = torch.float32
        # no 16-bit number
        weight.grad = torch.full((3,), 1.0 + 2.0**-20)
        return weight

    ours = weight_and_gradient()
    report = dt.LossScaler("bf16").step(dt.SGD([ours], lr=2.0**-3))
    assert report.grad_norm.item() == pytest.approx(math.sqrt(3.0) * (1.0 + 2.0**-20), rel=1e-7)
    masters = dt.master_weights(nn.ParameterDict({"w": ours}))
    assert masters["w"].tolist() == [1.0 - 2.0**-3 * (1.0 + 2.0**-20)] * 3
    for kind in (dt.AdamW, dt.Lion):
        kind([weight := weight_and_gradient()], lr=0.125).step()
        assert weight.tolist() == pytest.approx([0.875] * 3, rel=0.01)

    message = message_of(torch.optim.AdamW([weight_and_gradient()], fused=fused).step)
    torch_has_it("expected" in message)


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}])
def test_a_skipped_step_is_known_and_holds_the_schedule(settings):
    weight = nn.Parameter(torch.zeros(2))
    for kind in (dt.AdamW, lambda params: torch.optim.AdamW(params, **settings)):
        optimizer, scaler = kind([weight]), dt.LossScaler("fp16-mixed")
        # built before any step, and one after
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]
        epochs = []
        for number, value in enumerate((1.0, math.inf, 1.0, math.nan)):
            if number == 1:
                schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
            scaler.scale(torch.ones(()))
            weight.grad = torch.full((2,), value)
            report = scaler.step(optimizer, scheduler=schedulers)
            assert report.skipped.item() == (not math.isfinite(value))
            epochs.append([each.last_epoch for each in schedulers])
        assert epochs == [[1], [1, 0], [2, 1], [2, 1]]

    theirs, plain = torch_scaler(), torch.optim.AdamW([weight], **settings)
    returned = []
    for value in (1.0, math.inf):
        weight.grad = torch.full((2,), value)
        returned.append(theirs.step(plain))
        theirs.update()
    # a step that was taken and one that was not look the same
    torch_has_it(returned[0] == returned[1])


def untrained(policy: str) -> tuple[nn.Module, torch.optim.Optimizer, dt.LossScaler]:
    torch.manual_seed(0)
    model = dt.cast(nn.Linear(8, 4), policy)
    return model, dt.AdamW(model.parameters(), lr=1e-5), dt.LossScaler(policy, patience=None)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: dt.LossScaler, steps: Iterable[int]) -> None:
    for step in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        scaler.backward(model(x).square().mean())
        scaler.step(optimizer)
        optimizer.zero_grad()


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_masters_survive_a_resume_from_state_dicts(policy, same_bits):
    whole, parts = untrained(policy), untrained(policy)
    train(*whole, range(6))
    train(*parts, range(3))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    resumed = untrained(policy)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    before, after = dt.master_weights(parts[0]), dt.master_weights(resumed[0])
    assert all(same_bits(before[name], after[name]) for name in before)
    # there is something to lose
    assert not torch.equal(before["weight"], parts[0].weight.float())
    train(*resumed, range(3, 6))
    expected, got = dt.master_weights(whole[0]), dt.master_weights(resumed[0])
    assert all(same_bits(expected[name], got[name]) for name in expected)


def moments(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor:
    return optimizer.state[weight]["exp_avg"]


def test_loading_casts_no_state(same_bits):
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 0.3)
    for optimizer in (dt.AdamW([weight]), dt.MasterWeights(torch.optim.AdamW([weight]))):
        optimizer.step()
        before = moments(optimizer, weight).clone()
        assert not torch.equal(before, before.bfloat16().float())
        optimizer.load_state_dict(optimizer.state_dict())
        assert same_bits(moments(optimizer, weight), before)

    plain = torch.optim.AdamW([weight])
    plain.step()
    state = plain.state_dict()
    state["state"][0]["exp_avg"] = torch.full((3,), 1 / 3)
    plain.load_state_dict(state)
    torch_has_it(moments(plain, weight).dtype == torch.bfloat16)
