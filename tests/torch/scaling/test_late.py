"""Scalars that reach the host late: what is received, once, and the last of what was sent."""

import pytest
import torch

from duotone.torch.scaling.late import Late


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_what_is_sent_is_received_once(dtype):
    late = Late()
    assert late.receive() is None
    late.send(torch.tensor([1, 0, 1], dtype=dtype))
    received = late.receive()
    assert received == [1, 0, 1]
    assert [type(value) for value in received] == [type(torch.zeros((), dtype=dtype).item())] * 3
    assert late.receive() is None


def test_only_the_last_ones_are_received():
    late = Late()
    late.send(torch.tensor([1.0]))
    late.send(torch.tensor([2.0, 3.0]))
    assert late.receive() == [2.0, 3.0]
    assert late.receive() is None


def test_large_scales_and_inf_arrive_as_they_are():
    late = Late()
    values = [2.0**127, 2.0**-126, float("inf"), float(2**31 - 1)]
    late.send(torch.tensor(values, dtype=torch.float64))
    assert late.receive() == values
