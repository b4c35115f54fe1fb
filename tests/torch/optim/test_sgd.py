"""SGD against torch's on FP32 weights with every option, split weights against whole ones, and its settings."""

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.parameters.masters import read_master

SETTINGS = [
    {"lr": 0.05},
    {"lr": torch.tensor(0.05), "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    {"lr": 0.05, "momentum": 0.9, "dampening": 0.5},
    {"lr": 0.05, "weight_decay": 0.1},
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_step_is_torchs_within_two_ulps(make_parameters, give_gradients, ulps, settings):
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer, reference = dt.SGD(ours, **settings), torch.optim.SGD(theirs, **settings, foreach=False)
    for step in range(20):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        # a parameter without a gradient neither decays nor moves by its momentum; its first step may come late
        if step in (0, 7):
            ours[0].grad = theirs[0].grad = None
        before = [parameter.detach().clone() for parameter in theirs]
        optimizer.step()
        reference.step()
        for own, other, weight in zip(ours, theirs, before, strict=True):
            assert ulps(own, other) <= 2
            buffer = reference.state[other].get("momentum_buffer")
            if buffer is not None:
                assert ulps(optimizer.state[own]["momentum_buffer"], buffer, smallest=1.0) <= 2
                optimizer.state[own]["momentum_buffer"].copy_(buffer)
            # the next step starts from the same state, and from weights that are not small
            own.data.copy_(weight)
            other.data.copy_(weight)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_split_weights_move_as_whole_ones(make_parameters, train, same_bits, settings):
    whole, split = make_parameters(torch.float32), make_parameters(torch.bfloat16)
    for parameters in (whole, split):
        train(dt.SGD(parameters, **settings), range(300))
    for one, other in zip(whole, split, strict=True):
        assert same_bits(one, read_master(other))
        assert other.dtype == torch.bfloat16


def test_without_momentum_there_is_no_buffer():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = dt.SGD([parameter], lr=0.1)
    optimizer.step()
    assert optimizer.state[parameter].keys() == {"step"}


def test_groups_have_their_own_settings():
    still, moving = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = dt.SGD([{"params": [still], "lr": 0.0}, {"params": [moving], "weight_decay": 1.0}], lr=0.5)
    still.grad, moving.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert moving.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr -1.0"),
        ({"momentum": -0.1}, "momentum -0.1.*none may be negative"),
        ({"weight_decay": -0.1}, "weight_decay -0.1; none may be negative"),
        ({"nesterov": True}, "nesterov needs a momentum and no dampening; got momentum 0.0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "got momentum 0.9, dampening 0.1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(OptimizerError, match=message):
        dt.SGD([nn.Parameter(torch.ones(1))], **settings)
