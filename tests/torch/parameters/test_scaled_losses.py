"""Gradients that carry a loss scale are not applied by an optimizer's own step."""

import copy
import gc

import pytest
import torch

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.parameters.scaled_losses import scaled_losses

from .test_plain_steps import X, net


@pytest.mark.parametrize("make", [dt.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("policy", ["fp16-mixed", None])
@pytest.mark.parametrize("scaler", [dt.LossScaler("fp16"), dt.GradScaler("cpu")])
def test_scaled_gradients_are_not_applied(make, policy, scaler):
    model = net() if policy is None else dt.cast(net(), policy)
    before = copy.deepcopy(model.state_dict())
    optimizer, other = make(model.parameters()), make(net().parameters())
    loss = model(X).square().mean()
    scaler.scale(loss).backward()
    # of other weights
    other.step()
    for _ in range(2):
        with pytest.raises(OptimizerError, match="carry the loss scale, and its own step would apply them"):
            optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    scaler.unscale_(optimizer)
    optimizer.step()
    scaler.step(optimizer)


@pytest.mark.parametrize("scaler", [dt.LossScaler("fp16"), dt.GradScaler("cpu")])
def test_gradients_that_were_divided_by_hand_are_applied(scaler, said):
    model = net()
    optimizer, scale = torch.optim.SGD(model.parameters(), lr=0.1), 2.0**16
    expected = model[0].bias.detach() - 0.1 * torch.autograd.grad(model(X).sum(), model[0].bias)[0]
    loss = model(X).sum()
    scaler.scale(loss).backward()
    for param in model.parameters():
        param.grad.div_(scale)
    for _ in range(2):
        optimizer.step()
        assert torch.allclose(model[0].bias, expected)
        optimizer.zero_grad(set_to_none=False)
    (message,) = said()
    assert "may carry the loss scale" in message


@pytest.mark.parametrize("policy", ["fp16", None])
@pytest.mark.parametrize("steps", [0, 2])
def test_scaled_gradients_are_known_though_nobody_holds_the_loss(policy, steps):
    scaler = dt.LossScaler("fp16")
    model = net() if policy is None else dt.cast(net(), policy)
    optimizer = dt.SGD(model.parameters(), lr=0.0)
    for _ in range(steps):
        scaler.backward(model(X).square().mean())
        scaler.step(optimizer)
        optimizer.zero_grad()
    for _ in range(2):
        # the second is added to the first
        scaler.backward(model(X).square().mean())
        with pytest.raises(OptimizerError, match="carry the loss scale"):
            optimizer.step()
    scaler.step(optimizer)
    assert id(scaler) not in scaled_losses


def test_what_a_scaled_loss_has_nothing_to_do_with_is_stepped(said):
    scaler, model, other = dt.LossScaler("fp16"), net(), net()
    optimizer, by_hand = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, other))
    for _ in range(3):
        scaler.backward(model(X).sum())
        other(X).sum().backward()
        by_hand.step()
        scaler.step(optimizer)
    # gradients that were let go of, and come from another loss
    held = model(X).sum()
    scaler.backward(held)
    optimizer.zero_grad()
    optimizer.step()
    model(X).sum().backward()
    optimizer.step()
    scaler.backward(model(X).sum())
    scaler.unscale_(optimizer)
    optimizer.step()
    assert said() == []


def test_a_scaled_loss_that_is_gone_is_named(said):
    scaler, model = dt.LossScaler("fp16"), dt.cast(net(), "fp16")
    optimizer = dt.SGD(model.parameters(), lr=0.0)
    scaler.scale(model(X).sum()).backward()
    optimizer.step()
    (message,) = said()
    assert "a loss was scaled since the last step, and its scale was not taken out" in message


@pytest.mark.parametrize("policy", ["fp16,loss_scale=1", "bf16", None])
def test_gradients_that_were_filled_with_zeros_carry_no_scale(policy, said):
    scaler, model = dt.LossScaler("fp16"), net() if policy is None else dt.cast(net(), policy)
    optimizer = dt.SGD(model.parameters(), lr=0.0)
    scaler.backward(model(X).sum())
    optimizer.zero_grad(set_to_none=False)
    model(X).sum().backward()
    optimizer.step()
    assert said() == []


def test_zeros_in_another_optimizers_gradients_hide_nothing():
    scaler, model = dt.LossScaler("fp16"), net()
    optimizer, other = dt.SGD(model.parameters(), lr=0.0), dt.SGD(net().parameters(), lr=0.0)
    scaler.backward(model(X).sum())
    other.zero_grad(set_to_none=False)
    with pytest.raises(OptimizerError, match="carry the loss scale"):
        optimizer.step()


@pytest.mark.parametrize("kind", [lambda: dt.LossScaler("fp16"), lambda: dt.GradScaler("cpu")])
def test_losses_of_a_run_that_is_over_are_forgotten(kind, said):
    for _ in range(3):
        scaler = kind()
        scaler.scale(net()(X).sum()).backward()
    del scaler
    gc.collect()
    model = dt.cast(net(), "fp16,loss_scale=1")
    optimizer = dt.SGD(model.parameters(), lr=0.0)
    model(X).sum().backward()
    optimizer.step()
    assert said() == []
    assert not any(entry.scaler() is None for entry in scaled_losses.values())
