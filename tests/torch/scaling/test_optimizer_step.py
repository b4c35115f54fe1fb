"""One optimizer in a step: what its gradients are multiplied by, and what is known of gradients that were unscaled."""

import math

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.torch.scaling.optimizer_step import OptimizerStep, grad_multiplier


@pytest.mark.parametrize("clip_norm", [1.0, 0.3, 1e300, 5e-324, 7])
def test_the_multiplier_in_every_bit(clip_norm):
    sums = [0.0, 5e-324, 1e-300, 2.0**-126, 0.1, 1 / 3, 1.0, 2.0, 1e38, 1e300, math.inf, math.nan]
    for sum_of_squares in torch.tensor(sums, dtype=torch.float64):
        for inverse in (1.0, 2.0**-16, 2.0**-126, 2.0**126):
            inverse_scale = torch.tensor(inverse)
            # a norm of 0 makes the quotient Inf, and the smaller is 1
            expected = ((clip_norm / sum_of_squares.sqrt()).clamp(max=1.0) * inverse_scale).float()
            of_tensors = grad_multiplier(sum_of_squares, inverse_scale, clip_norm)
            of_numbers = grad_multiplier(sum_of_squares.item(), inverse, clip_norm)
            for found in (of_tensors, of_numbers):
                assert found.dtype == torch.float32
                assert torch.equal(found.view(torch.int32), expected.view(torch.int32)) or (
                    found.isnan() and expected.isnan()
                )


def part_of(*grads, found_inf_ahead=None):
    params = [nn.Parameter(torch.zeros(2)) for _ in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else torch.full((2,), grad)
    part = OptimizerStep(dt.SGD(params, lr=1.0), found_inf_ahead)
    part.inverse_scale = torch.tensor(0.5)
    return part, params


def test_parameters_without_a_gradient_are_left_out():
    part, params = part_of(1.0, None, 3.0)
    assert [id(param) for param in part.params] == [id(params[0]), id(params[2])]
    assert [grad[0].item() for grad in part.grads] == [1.0, 3.0]


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("ahead", [None, False, True])
def test_what_was_found_ahead_of_the_step_is_not_forgotten(here, ahead):
    part, params = part_of(math.inf if here else 2.0, found_inf_ahead=None if ahead is None else torch.tensor(ahead))
    part.set_stats(*part.stats_of(part.grads))
    assert part.found_inf.item() == (here or bool(ahead))
    part.update(None)
    assert params[0].tolist() == ([0.0, 0.0] if part.found_inf else [-1.0, -1.0])
