"""AdamW against torch's on FP32 weights, split weights against whole ones, and its settings."""

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.parameters.masters import read_master

SETTINGS = [
    {},
    {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    {"maximize": True, "weight_decay": 0.0},
    {"lr": torch.tensor(0.01), "betas": (0.0, 0.0)},
]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_step_is_torchs_within_two_ulps(make_parameters, give_gradients, ulps, settings):
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer, reference = dt.AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings, foreach=False)
    for step in range(30):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        # one parameter has no gradient now and then: its moments and its step count stand still
        if step in (0, 7):
            ours[0].grad = theirs[0].grad = None
        before = [parameter.detach().clone() for parameter in theirs]
        optimizer.step()
        reference.step()
        for own, other, weight in zip(ours, theirs, before, strict=True):
            assert ulps(own, other) <= 2
            if other.grad is not None:
                state, expected = optimizer.state[own], reference.state[other]
                # a mean of gradients may be far smaller than they are
                assert ulps(state["exp_avg"], expected["exp_avg"], smallest=1.0) <= 2
                assert ulps(state["exp_avg_sq"], expected["exp_avg_sq"]) <= 2
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name].copy_(expected[name])
            # the next step starts from the same state, and from weights that are not small
            own.data.copy_(weight)
            other.data.copy_(weight)
        assert [optimizer.state[p]["step"].item() for p in ours[1:]] == [step + 1] * 3
    assert optimizer.state[ours[0]]["step"].item() == 28


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_split_weights_move_as_whole_ones(make_parameters, train, same_bits, settings):
    whole, split = make_parameters(torch.float32), make_parameters(torch.bfloat16)
    for parameters in (whole, split):
        train(dt.AdamW(parameters, **settings), range(300))
    for one, other in zip(whole, split, strict=True):
        assert same_bits(one, read_master(other))
        assert other.dtype == torch.bfloat16


def test_split_weights_are_whole_ones_after_thousands_of_steps(make_parameters, train, same_bits):
    whole, split = make_parameters(torch.float32), make_parameters(torch.bfloat16)
    for parameters in (whole, split):
        train(dt.AdamW(parameters, lr=1e-3), range(3000))
    assert all(same_bits(one, read_master(other)) for one, other in zip(whole, split, strict=True))


def test_float16_weights_move_as_whole_ones_where_the_tail_is_exact(make_parameters, train, same_bits):
    whole, split = make_parameters(torch.float32), make_parameters(torch.float16)
    for parameters in (whole, split):
        for parameter in parameters:
            parameter.grad_dtype = torch.float32
        # every weight stays far from those below 2^-16
        train(dt.AdamW(parameters, lr=1e-3), range(300))
    assert all(same_bits(one, read_master(other)) for one, other in zip(whole, split, strict=True))


def test_groups_have_their_own_settings():
    still, moving = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = dt.AdamW([{"params": [still], "lr": 0.0}, {"params": [moving], "weight_decay": 0.3}], lr=0.5)
    still.grad, moving.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert moving.tolist() == pytest.approx([1.0 - 0.5 * 0.3 - 0.5] * 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr -1.0"),
        ({"eps": -1e-8}, "eps -1e-08.*none may be negative"),
        ({"weight_decay": -0.1}, "weight_decay -0.1; none may be negative or NaN"),
        ({"lr": float("nan")}, "lr nan, eps .*; none may be negative or NaN"),
        ({"lr": torch.tensor(-1.0)}, "none may be negative or NaN"),
        ({"eps": float("nan")}, "eps nan.*none may be negative or NaN"),
        ({"weight_decay": float("nan")}, "weight_decay nan; none may be negative or NaN"),
        ({"betas": (1.0, 0.9)}, r"betas are \(1.0, 0.9\); each must be in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas are \(0.9, -0.1\)"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(OptimizerError, match=message):
        dt.AdamW([nn.Parameter(torch.ones(1))], **settings)
