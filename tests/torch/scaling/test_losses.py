"""Which loss of a step was the first that is not finite, on the host and on a device."""

import math

import pytest
import torch

from duotone.torch.scaling.losses import Losses

CPU = torch.device("cpu")


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(
    ("values", "first"),
    [
        ([1.0, 2.0], 0),
        ([], 0),
        ([math.nan], 1),
        ([1.0, -math.inf, 1.0, math.nan], 2),
        ([[1.0, 2.0], [1.0, math.inf]], 2),
        ([[]], 0),
    ],
)
def test_the_first_is_remembered(values, first, on_host):
    losses = Losses()
    for value in values:
        losses.add(torch.tensor(value), on_host=on_host)
    assert losses.count == len(values)
    assert int(losses.first_non_finite(CPU, on_host=on_host)) == first
    assert losses.any_non_finite(CPU).item() == (first != 0)


@pytest.mark.parametrize("on_host", [True, False])
def test_what_may_come_from_a_scaled_loss_is_not_checked(on_host):
    losses = Losses()
    losses.add(torch.tensor(1.0), on_host=on_host)
    losses.ignore_later()
    losses.add(torch.tensor(math.nan), on_host=on_host)
    assert losses.count == 2
    assert not losses.any_non_finite(CPU)


def test_a_loss_on_the_host_may_come_before_one_on_a_device():
    losses = Losses()
    losses.add(torch.tensor(math.nan), on_host=True)
    losses.add(torch.tensor(math.nan), on_host=False)
    assert losses.first_non_finite(CPU, on_host=False) == 1
