"""What a scaler sees of the loop around it: a policy that does not fit, clipping at the wrong place, too many sums."""

import copy

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.torch.scaling import device_scale
from duotone.torch.scaling.loop_check import FEWEST

NEEDLESS, NOTHING = "scales losses without need", "this LossScaler scales nothing"
CLIPPED = "the norm of the scaled gradients was"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def train(model, scaler, optimizer, *, steps=5, clip=None, set_to_none=True, losses=1) -> None:
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        for _ in range(losses):
            scaler.backward(model(torch.randn(4, 8)).square().mean() / losses)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=set_to_none)
    assert next(model.parameters()).dtype == dtype


@pytest.mark.parametrize(
    ("policy", "scaled_for", "expected"),
    [
        ("fp16", "bf16", NOTHING),
        ("fp16-mixed", "fp32", NOTHING),
        ("bf16", "fp16", NEEDLESS),
        ("fp32", "fp16", NEEDLESS),
        ("fp16", "fp16", None),
        ("fp16", "fp16,loss_scale=8", None),
        ("fp16,loss_scale=1", "bf16", None),
        ("fp16,loss_scale=1", "fp16", None),
        ("bf16", "fp32", None),
        (None, "fp16", None),
        (None, "bf16", None),
    ],
)
def test_a_scaler_of_another_policy_is_named_once(policy, scaled_for, expected, said):
    model = net() if policy is None else dt.cast(net(), policy)
    optimizer = dt.AdamW(model.parameters())
    scaler = dt.LossScaler(scaled_for)
    train(model, scaler, optimizer, steps=2)
    assert [expected in message for message in said()] == ([] if expected is None else [True])
    # another optimizer is looked at too
    train(model, scaler, dt.AdamW(model.parameters()), steps=1)
    assert len(said()) == (0 if expected is None else 2)


def test_weights_that_were_made_half_need_a_scale_too(said):
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    scaler = dt.LossScaler("bf16")
    scaler.backward(weight.sum())
    scaler.step(dt.SGD([weight], lr=0.1))
    (message,) = said()
    assert "but the weights are in float16" in message


def test_models_of_two_policies_share_a_scaler(said):
    first, second = dt.cast(nn.Linear(8, 8), "bf16"), dt.cast(nn.Linear(8, 1), "fp16")
    optimizer = dt.AdamW([*first.parameters(), *second.parameters()])
    scaler = dt.LossScaler("fp16")
    scaler.backward(second(first(torch.ones(1, 8))).sum())
    scaler.step(optimizer)
    assert said() == []


@pytest.mark.parametrize("limit", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("settings", [{}, {"set_to_none": False}, {"losses": 3}])
@pytest.mark.parametrize("on_device", [False, True])
def test_clipping_before_unscaling_is_named_once(limit, settings, on_device, said, monkeypatch):
    if on_device:
        monkeypatch.setattr(device_scale, "is_on_host", lambda device: False)
    model = dt.cast(net(), "fp16,grad=float32")
    scaler = dt.LossScaler("fp16")
    train(model, scaler, dt.AdamW(model.parameters()), steps=8, clip=limit, **settings)
    (message,) = said()
    assert message.startswith(f"{CLIPPED} {limit:g} in each of 3 steps")
    assert f"scaler.step(optimizer, clip_norm={limit:g})" in message


def test_a_norm_that_overflows_in_16_bits_hides_no_clipping(said):
    # of FP16 gradients torch takes the norm in FP16, and what is clipped by Inf is 0
    model = dt.cast(net(), "fp16")
    train(model, dt.LossScaler("fp16"), dt.AdamW(model.parameters()), steps=12, clip=1.0)
    assert [message.startswith(f"{CLIPPED} 1 in") for message in said()] == [True]


@pytest.mark.parametrize("on_device", [False, True])
def test_clipping_by_value_before_unscaling_is_named_too(on_device, said, monkeypatch):
    if on_device:
        monkeypatch.setattr(device_scale, "is_on_host", lambda device: False)
    model = dt.cast(net(), "fp16")
    model.empty = nn.Parameter(torch.zeros(0))
    optimizer, scaler = dt.AdamW(model.parameters()), dt.LossScaler("fp16", init_scale=2.0**10)
    for _ in range(8):
        scaler.backward(model[2](model[1](model[0](torch.randn(4, 8)))).float().square().mean() + model.empty.sum())
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        scaler.step(optimizer)
        optimizer.zero_grad()
    (message,) = said()
    assert message.startswith("the largest of the scaled gradients was 0.01 in each of 3 steps")


@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_is_no_clipping_is_not_named(set_to_none, said):
    model = dt.cast(net(), "fp16")
    optimizer, scaler = dt.AdamW(model.parameters()), dt.LossScaler("fp16")
    train(model, scaler, optimizer, set_to_none=set_to_none)
    # with true gradients, and in policies without a scale
    for _ in range(4):
        scaler.backward(model(torch.randn(4, 8)).square().mean())
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        optimizer.zero_grad()
    model = dt.cast(net(), "bf16")
    train(model, dt.LossScaler("bf16"), dt.AdamW(model.parameters()), clip=0.1)
    assert said() == []


@pytest.mark.parametrize(
    ("policy", "losses", "expected"),
    [("bf16", FEWEST, 1), ("bf16", FEWEST - 1, 0), ("bf16,grad=float32", FEWEST, 0), ("fp16", FEWEST, 0)],
)
def test_many_sums_in_16_bits_are_named_once(policy, losses, expected, said):
    model = dt.cast(nn.Linear(8, 1), policy)
    train(model, dt.LossScaler(policy), dt.AdamW(model.parameters()), steps=2, losses=losses)
    assert len(said()) == expected
    assert all(f"{losses} losses were summed into gradients in torch.bfloat16" in each for each in said())


def test_sums_of_many_gradients_are_off_by_as_much_as_the_page_says():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 1))
    batches = [torch.randn(4, 64) for _ in range(256)]

    def gradient(model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        for x in batches:
            target = x.sum(1, keepdim=True) / 8 + 1
            ((model(x.to(dtype)) - target.to(dtype)).square().mean() / len(batches)).backward()
        return torch.cat([param.grad.double().flatten() for param in model.parameters()])

    true = gradient(copy.deepcopy(model).double(), torch.float64)
    off = {
        policy: ((gradient(dt.cast(copy.deepcopy(model), policy), torch.float32) - true).norm() / true.norm()).item()
        for policy in ("bf16", "bf16,grad=float32")
    }
    assert 0.01 < off["bf16"] < 0.02
    assert off["bf16,grad=float32"] < 0.002


def test_copies_of_a_scaler_look_anew(said):
    model = dt.cast(nn.Linear(8, 1), "fp16")
    optimizer, scaler = dt.AdamW(model.parameters()), dt.LossScaler("bf16")
    for each in (scaler, copy.deepcopy(scaler)):
        train(model, each, optimizer, steps=1)
    assert len(said()) == 2


def train_with_grad_scaler(
    scaler, optimizer, params, loss_of, *, clip, unscale=False, set_to_none=True, losses=1
) -> None:
    for _ in range(8):
        for _ in range(losses):
            scaler.scale(loss_of() / losses).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=set_to_none)


OPTIMIZERS = {
    "AdamW": dt.AdamW,
    "MasterWeights": lambda params: dt.MasterWeights(torch.optim.NAdam(params)),
    "torch": torch.optim.AdamW,
    "fused": lambda params: torch.optim.AdamW(params, fused=True),
}


@pytest.mark.parametrize("settings", [{}, {"set_to_none": False}, {"losses": 3}])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_clipping_before_unscaling_is_named_for_a_grad_scaler_too(settings, kind, said):
    model = dt.cast(net(), "fp16,grad=float32" if kind in ("AdamW", "MasterWeights") else "fp16-mixed")
    optimizer, params = OPTIMIZERS[kind](model.parameters()), list(model.parameters())
    scaler = copy.deepcopy(dt.GradScaler("cpu", init_scale=2.0**8))
    train_with_grad_scaler(
        scaler, optimizer, params, lambda: model(torch.randn(4, 8)).square().mean(), clip=0.5, **settings
    )
    (message,) = said()
    assert message.startswith(f"{CLIPPED} 0.5 in each of 3 steps")
    assert "or call scaler.unscale_(optimizer) before you clip" in message


@pytest.mark.parametrize(
    "settings", [{"clip": 0.1, "unscale": True}, {"clip": None}, {"clip": None, "set_to_none": False}]
)
def test_what_is_no_clipping_is_not_named_for_a_grad_scaler(settings, said):
    model = dt.cast(net(), "fp16")
    scaler, optimizer = dt.GradScaler("cpu", init_scale=2.0**8), dt.AdamW(model.parameters())
    params = list(model.parameters())
    train_with_grad_scaler(scaler, optimizer, params, lambda: model(torch.randn(4, 8)).square().mean(), **settings)
    disabled = dt.GradScaler("cpu", enabled=False)
    plain = nn.Linear(8, 1)
    train_with_grad_scaler(
        disabled,
        torch.optim.SGD(plain.parameters()),
        list(plain.parameters()),
        lambda: plain(torch.ones(1, 8)).sum(),
        clip=0.1,
    )
    assert said() == []
