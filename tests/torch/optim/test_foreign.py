"""What torch's fused optimizers and a loss scaler agree on."""

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from duotone.torch.optim.foreign import fused_step, loses_float16_updates, skips_on_device, takes_scaler

KINDS = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad]
GO, SKIP = torch.tensor(False), torch.tensor(True)


def fused(kind, **settings):
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.full((3,), 4.0)
    return kind([param], lr=0.5, fused=True, **settings), param


@pytest.mark.parametrize("kind", KINDS)
def test_fused_optimizers_of_torch_are_known(kind):
    optimizer, param = fused(kind)
    # Adagrad of torch 2.11 is stepped by the host
    assert skips_on_device(optimizer) or (kind is torch.optim.Adagrad and TorchVersion(torch.__version__) < "2.13")
    assert loses_float16_updates(optimizer)
    assert not takes_scaler(optimizer)
    assert not skips_on_device(kind([param]))


@pytest.mark.parametrize("fused_setting", [False, None])
def test_in_one_group_that_is_not_fused_torch_cannot_skip(fused_setting):
    optimizer, _ = fused(torch.optim.SGD)
    optimizer.param_groups[0]["fused"] = fused_setting
    assert not skips_on_device(optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_divided_by_the_scale(kind):
    (optimizer, param), (other, expected) = fused(kind), fused(kind)
    fused_step(optimizer, torch.tensor(4.0), GO)
    expected.grad.div_(4.0)
    other.step()
    assert torch.equal(param, expected)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize(("kind", "settings"), [*((kind, {}) for kind in KINDS), (torch.optim.SGD, {"momentum": 0.9})])
def test_a_skipped_step_leaves_the_next_one_as_a_first(kind, settings):
    (optimizer, param), (other, expected) = fused(kind, **settings), fused(kind, **settings)
    fused_step(optimizer, None, SKIP)
    assert param.tolist() == [1.0] * 3
    for _ in range(2):
        fused_step(optimizer, None, GO)
        other.step()
    assert torch.equal(param, expected)


def test_a_failed_step_leaves_no_scalars_behind():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise OSError

    optimizer, _ = fused(Failing)
    with pytest.raises(OSError, match=r"^$"):
        fused_step(optimizer, torch.ones(()), GO)
    assert not hasattr(optimizer, "grad_scale")


def test_arguments_and_results_are_handed_on():
    class Asking(torch.optim.SGD):
        def step(self, closure=None, *, grad_scale=0):  # type: ignore[override]
            return closure, grad_scale

    optimizer, _ = fused(Asking)
    assert fused_step(optimizer, None, GO, "closure", grad_scale=3) == ("closure", 3)
