"""Explaining changes nothing: not the model, not random states, after an error neither."""

import copy
import random

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import duotone.torch as dt
from duotone.torch.explanation import explain


class Busy(nn.Module):
    """Changes whatever a forward pass can change."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.embed = nn.Embedding(4, 8, max_norm=0.1)
        self.register_buffer("replaced", torch.ones(2))
        self.register_buffer("through_data", torch.ones(2))
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.replaced = self.replaced * 2
        self.through_data.data.mul_(3)
        self.register_buffer("added", torch.ones(1))
        self.drop.eval()
        random.random()
        numpy.random.rand()
        x = self.drop(self.norm(x)) + torch.rand(1) + self.embed(torch.tensor([1]))
        if self.fails:
            raise ZeroDivisionError
        return x


def same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


@pytest.mark.parametrize("policy", [None, "bf16"])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(policy, fails):
    model = Busy(fails)
    if policy:
        dt.cast(model, policy)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = copy.deepcopy(model.state_dict())
    kept = {name: id(buffer) for name, buffer in model.named_buffers()}
    forwards = {path: module.__dict__.get("forward") for path, module in model.named_modules()}
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()

    def run() -> None:
        explain(model, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))

    if fails:
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        run()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(same(after[name], before[name]) for name in before)
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == kept
    assert all(param.grad is not None and (param.grad == 1).all() for param in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy.random.get_state()[1].tolist() == states[2]
    for path, module in model.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert module.__dict__.get("forward") is forwards[path]
    assert not _get_current_function_mode_stack()


def test_a_graph_from_before_still_goes_back():
    model = nn.BatchNorm1d(8).eval()
    loss = model(torch.ones(4, 8, requires_grad=True)).sum()
    explain(model, torch.ones(4, 8))
    loss.backward()


def test_the_run_has_gradients_whatever_is_around_it():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        found = explain(model, torch.ones(2, 4))
    with torch.inference_mode():
        inside = explain(model, run=lambda: model(torch.ones(2, 4)).exp())
    assert found.saved_for_backward.activation_bytes == {"float32": 2 * 4 * 4}
    # the exponential saves its result
    assert inside.saved_for_backward.activation_bytes == {"float32": 2 * (2 * 4 * 4)}
