"""Scalars on their way to the host: they are received once, the last ones that were sent."""

import pytest
import torch

from duotone.torch.readback import Readback


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_what_is_sent_is_received_once(dtype):
    readback = Readback()
    assert readback.receive() is None
    readback.send(torch.tensor([1, 0, 1], dtype=dtype))
    received = readback.receive()
    assert received == [1, 0, 1]
    assert [type(value) for value in received] == [type(torch.zeros((), dtype=dtype).item())] * 3
    assert readback.receive() is None


def test_only_the_last_ones_are_received():
    readback = Readback()
    readback.send(torch.tensor([1.0]))
    readback.send(torch.tensor([2.0, 3.0]))
    assert readback.receive() == [2.0, 3.0]
    assert readback.receive() is None


def test_large_scales_and_inf_arrive_as_they_are():
    readback = Readback()
    values = [2.0**127, 2.0**-126, float("inf"), float(2**31 - 1)]
    readback.send(torch.tensor(values, dtype=torch.float64))
    assert readback.receive() == values
