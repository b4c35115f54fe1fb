"""A loss scale on the host and on a device: the same states, in numbers and in tensors."""

import pytest
import torch

from duotone.loss_scale import LossScale
from duotone.torch.scaling import device_scale
from duotone.torch.scaling.device_scale import initial_scale

CPU = torch.device("cpu")
SETTINGS = LossScale(init_scale=8.0, growth_interval=2, hysteresis=2)


@pytest.fixture
def on_device(monkeypatch):
    """Have the CPU treated as a device that the host has to wait for."""
    monkeypatch.setattr(device_scale, "is_on_host", lambda device: False)


def test_on_the_host_it_is_in_numbers():
    scale = initial_scale(SETTINGS)
    assert scale.on_host
    assert scale.to(CPU) is scale
    assert scale.leaf(torch.tensor(True)) is scale.leaf(True) is True
    assert scale.inverse() == 0.125


def test_on_a_device_it_is_in_tensors(on_device):
    host = initial_scale(SETTINGS)
    scale = host.to(CPU)
    assert not scale.on_host
    assert scale.to(CPU) is scale
    leaves = vars(scale.state)
    assert [leaf.dtype for leaf in leaves.values()] == [torch.float32] + [torch.int32] * 5
    assert scale.numbers() == host.numbers() == vars(host.state)
    flag = torch.tensor(True)
    assert scale.leaf(flag) is flag
    assert scale.inverse().item() == 0.125


@pytest.mark.parametrize("steps", ["..", "oo", "o..o", "..n", "nno", "oo..o.."])
@pytest.mark.parametrize("method", ["after_step", "after_overflow"])
def test_both_move_alike(on_device, steps, method):
    host = initial_scale(SETTINGS)
    device = host.to(CPU)
    for step in steps:
        found_inf, finite = step != ".", step != "n"
        before = host
        host = getattr(host, method)(found_inf, finite)
        device = getattr(device, method)(torch.tensor(found_inf), torch.tensor(finite))
        assert device.numbers() == host.numbers()
        if method == "after_overflow" and not found_inf:
            assert host == before


@pytest.mark.parametrize("method", ["after_step", "after_overflow"])
def test_once_it_is_settled_nothing_of_a_search_is_on_a_device(on_device, method):
    scale = initial_scale(SETTINGS).settled().to(CPU)
    for found_inf in (True, False, True):
        scale = getattr(scale, method)(torch.tensor(found_inf), torch.tensor(True))
        assert scale.state.search == 0
        assert type(scale.state.search) is int
    assert scale.tensor("search").dtype == torch.int32


def test_a_scale_that_was_moved_in_inference_mode_is_a_normal_tensor(on_device):
    with torch.inference_mode():
        scale = initial_scale(SETTINGS).to(CPU)
    assert not scale.state.scale.is_inference()
