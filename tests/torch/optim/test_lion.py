"""Lion against its algorithm written out in FP64, split weights against whole ones, and its settings."""

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.parameters.masters import read_master

SETTINGS = [{}, {"lr": 0.01, "betas": (0.5, 0.9), "weight_decay": 0.3}, {"lr": torch.tensor(0.01), "maximize": True}]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_step_is_the_papers(make_parameters, give_gradients, ulps, settings):
    parameters = make_parameters(torch.float32)
    optimizer = dt.Lion(parameters, **settings)
    group = optimizer.param_groups[0]
    lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
    momenta = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    for step in range(30):
        give_gradients(parameters, step)
        before = [parameter.detach().double() for parameter in parameters]
        optimizer.step()
        for place, parameter in enumerate(parameters):
            grad = parameter.grad.double() * (-1.0 if group["maximize"] else 1.0)
            direction = beta1 * momenta[place] + (1.0 - beta1) * grad
            # the sign of a sum that is nearly 0 is FP32's to choose
            clear = direction.abs() > 1e-6
            expected = before[place] - lr * (direction.sign() + decay * before[place])
            assert ulps(parameter[clear], expected[clear].float()) <= 2
            momenta[place] = beta2 * momenta[place] + (1.0 - beta2) * grad
            assert ulps(optimizer.state[parameter]["exp_avg"], momenta[place].float(), smallest=1.0) <= 2
            momenta[place] = optimizer.state[parameter]["exp_avg"].double()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_split_weights_move_as_whole_ones(make_parameters, train, same_bits, settings):
    whole, split = make_parameters(torch.float32), make_parameters(torch.bfloat16)
    for parameters in (whole, split):
        train(dt.Lion(parameters, **settings), range(300))
    assert all(same_bits(one, read_master(other)) for one, other in zip(whole, split, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr -1.0"),
        ({"weight_decay": -0.1}, "weight_decay -0.1; none may be negative or NaN"),
        ({"betas": (1.0, 0.9)}, r"betas are \(1.0, 0.9\); each must be in \[0, 1\)"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(OptimizerError, match=message):
        dt.Lion([nn.Parameter(torch.ones(1))], **settings)
