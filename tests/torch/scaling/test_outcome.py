"""The record of a step, on a device and on the host."""

import math

import pytest
import torch

from duotone.torch.scaling.outcome import Outcome

HOST = Outcome(7, 2.0**16, 3, 2, True, [True, False], 1)


def on_device(outcome):
    *values, each, search = outcome[1:]
    return Outcome(outcome.step, *map(torch.tensor, values), list(map(torch.tensor, each)), torch.tensor(search))


@pytest.mark.parametrize(
    "outcome",
    [
        HOST,
        Outcome(1, 2.0**-126, 2**31 - 1, 0, False, [True]),
        Outcome(2**40, 2.0**127, 0, 2**24 + 1, True, [False] * 5),
        Outcome(1, math.inf, 0, 0, False, []),
    ],
)
def test_it_is_the_same_after_its_way_to_the_host(outcome):
    sent = on_device(outcome)
    assert (outcome.is_on_device, sent.is_on_device) == (False, True)
    tensor = sent.to_tensor()
    assert (tensor.dtype, tensor.ndim) == (torch.float64, 1)
    received = sent.with_values(tensor.tolist())
    assert received == outcome
    assert [type(value) for value in received] == [type(value) for value in outcome]


def test_what_the_host_knows_already_is_sent_with_the_rest():
    # a run without a scaled loss
    sent = on_device(HOST)._replace(non_finite_loss=0, any_non_finite_loss=False)
    received = sent.with_values(sent.to_tensor().tolist())
    assert received == HOST._replace(non_finite_loss=0, any_non_finite_loss=False)
