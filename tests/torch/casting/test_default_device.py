"""A cast model where torch.set_default_device has put its mode on every function."""

import copy

import pytest
import torch
from torch import nn

import duotone.torch as dt


@pytest.mark.parametrize("policy", ["bf16", "bf16-mixed"])
def test_a_default_device_leaves_the_short_way_into_modules_open(policy, calls_in):
    # its mode is called for every function: what a cast model adds to that may not grow
    model = nn.Sequential(*[nn.Linear(4, 4), nn.GELU(), nn.Dropout(0.0)] * 4)
    cast = dt.cast(copy.deepcopy(model), policy)
    x = torch.ones(2, 4)
    expected = cast(x)

    def calls() -> list[int]:
        for each in (model, cast):
            each(x)
        return [calls_in(lambda each=each: each(x)) for each in (model, cast)]

    plain, own = calls()
    torch.set_default_device("cpu")
    try:
        with_default, own_with_default = calls()
        assert torch.equal(cast(x), expected)
    finally:
        torch.set_default_device(None)
    assert own_with_default - own <= max(0, with_default - plain)
