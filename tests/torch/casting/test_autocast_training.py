"""Training FP32 weights under dt.autocast: no stale weights, FP32 gradients, and losses that fall as FP32's do."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import duotone.torch as dt
from duotone.torch.internals.dispatch import past_modes

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
CACHES = pytest.mark.parametrize("cache_enabled", [None, True, False])


def linear_past_modes(x: Tensor, weight: Tensor) -> Tensor:
    with past_modes():
        return F.linear(x, weight)


# the second is not seen by the region, so that torch's autocast casts its weight
LINEARS = pytest.mark.parametrize("linear", [F.linear, linear_past_modes])


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    data = torch.randn(64, 8)
    return data, data[:, :4].argmax(-1)


def train(
    trained: nn.Module, steps: int, region: Callable[[], AbstractContextManager[Any]], scaler: Any = None
) -> list[float]:
    """Return the losses of steps whose forward pass is in `region()`."""
    optimizer = (dt.AdamW if isinstance(scaler, dt.LossScaler) else torch.optim.AdamW)(trained.parameters(), 1e-2)
    (data, target), losses = batch(), []
    for _ in range(steps):
        with region():
            loss = F.cross_entropy(trained(data), target)
        if isinstance(scaler, dt.LossScaler):
            scaler.backward(loss)
            scaler.step(optimizer, clip_norm=10.0)
        elif scaler is not None:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 10.0)
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@HALVES
@CACHES
def test_a_whole_loop_inside_of_one_region_trains_on_its_weights(cache_enabled, dtype):
    apart, inside, theirs = model(), model(), model()
    expected = train(apart, 5, lambda: dt.autocast("cpu", dtype, cache_enabled=cache_enabled))
    with dt.autocast("cpu", dtype, cache_enabled=cache_enabled):
        got = train(inside, 5, nullcontext)
    assert got == expected
    assert got[-1] < 0.7 * got[0]
    assert all(torch.equal(one, other) for one, other in zip(apart.parameters(), inside.parameters(), strict=True))
    # what this is about: under torch.autocast the casts of the first step are used to the end
    with torch.autocast("cpu", torch.bfloat16):
        stale = train(theirs, 5, nullcontext)
    assert min(stale[2:]) > 0.7 * stale[0]


@HALVES
@LINEARS
@CACHES
def test_weights_that_change_inside_are_seen(cache_enabled, linear, dtype):
    weight = nn.Parameter(torch.ones(1, 1))
    with dt.autocast("cpu", dtype, cache_enabled=cache_enabled):
        assert linear(torch.ones(1, 1), weight).item() == 1.0
        with torch.no_grad():
            weight.fill_(2.0)
        assert linear(torch.ones(1, 1), weight).item() == 2.0
        # which a count of versions would not tell
        weight.data.fill_(3.0)
        assert linear(torch.ones(1, 1), weight).item() == 3.0
        weight.data = torch.full((1, 1), 4.0)
        assert linear(torch.ones(1, 1), weight).item() == 4.0


@HALVES
@LINEARS
def test_a_weight_first_used_without_gradients_has_one_later(linear, dtype):
    weight = nn.Parameter(torch.ones(1, 1))
    with dt.autocast("cpu", dtype):
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                linear(torch.ones(1, 1), weight)
        linear(torch.ones(1, 1), weight).float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert weight.grad.item() == 1.0


@HALVES
def test_gradients_of_many_uses_meet_in_float32(dtype):
    # under torch.autocast those of a cached cast are added in 16 bits, and stop at 256 in BF16
    weight = nn.Parameter(torch.ones(1, 1))
    with dt.autocast("cpu", dtype):
        uses = [F.linear(torch.ones(1, 1), weight) for _ in range(300)]
    torch.stack(uses).float().sum().backward()
    assert weight.grad.item() == 300.0


@HALVES
def test_graphs_live_as_long_as_they_are_needed(dtype):
    weight = nn.Parameter(torch.full((2, 2), 0.5))
    with dt.autocast("cpu", dtype):
        first = F.linear(torch.ones(1, 2), weight).exp().sum()
        first.backward(retain_graph=True)
        first.backward()
        twice = weight.grad.clone()
        # a graph of its own, although the first has gone
        F.linear(torch.ones(1, 2), weight).exp().sum().backward()
    torch.testing.assert_close(weight.grad, twice * 1.5)


@HALVES
def test_gradient_penalties(dtype):
    penalties = []
    for enabled in (False, True):
        trained, (data, target) = model(), batch()
        params = list(trained.parameters())
        with dt.autocast("cpu", dtype, enabled):
            loss = F.cross_entropy(trained(data), target)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        assert {grad.dtype for grad in grads} == {torch.float32}
        with dt.autocast("cpu", dtype, enabled):
            penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
            assert penalty.dtype == torch.float32
        (loss + penalty).backward()
        penalties.append([penalty, *(param.grad for param in params)])
    for exact, got in zip(*penalties, strict=True):
        torch.testing.assert_close(got, exact, rtol=0.05, atol=0.01)


SCALERS = {
    "none": lambda: None,
    "dt.LossScaler": lambda: dt.LossScaler("fp16"),
    "dt.GradScaler": lambda: dt.GradScaler("cpu"),
    "torch.amp.GradScaler": lambda: torch.amp.GradScaler("cpu"),
}


STEPS = 25


@functools.cache
def train_beside(dtype: torch.dtype | None) -> list[float]:
    """Return the losses in FP32, or under torch's autocast."""
    return train(model(), STEPS, lambda: torch.autocast("cpu", dtype, enabled=dtype is not None))


@HALVES
@pytest.mark.parametrize("name", SCALERS)
def test_the_loss_falls_as_in_float32_and_as_under_torch_autocast(name, dtype):
    exact, theirs = train_beside(None), train_beside(dtype)
    ours = train(model(), STEPS, lambda: dt.autocast("cpu", dtype), SCALERS[name]())
    assert exact[-1] < 0.3 * exact[0]
    torch.testing.assert_close(ours, exact, rtol=0, atol=0.02)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
