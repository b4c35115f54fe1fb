"""Names that people write who know another library lead to what they want."""

import re

import pytest
import torch

import duotone
import duotone.torch as dt
from duotone.torch.near_misses import OF_MODULE, OF_SCALER


@pytest.mark.parametrize("name", OF_SCALER)
def test_what_a_scaler_has_not_got(name):
    scaler = dt.LossScaler("fp16")
    assert not hasattr(scaler, name)
    with pytest.raises(AttributeError) as raised:
        getattr(scaler, name)
    assert str(raised.value) == f'a LossScaler has no attribute "{name}"; {OF_SCALER[name]}'
    for named in re.findall(r"scaler\.([\w.]+)", OF_SCALER[name]):
        value = scaler
        for part in named.split("."):
            value = getattr(value, part)


@pytest.mark.parametrize("name", OF_MODULE)
def test_what_the_module_has_not_got(name):
    with pytest.raises(AttributeError, match=f'^duotone.torch has no attribute "{name}"; ') as raised:
        getattr(dt, name)
    words = set(re.findall(r"\w+", str(raised.value).partition(";")[2]))
    assert words & set(dt.__all__)


def test_a_misspelled_name_has_its_nearest():
    with pytest.raises(AttributeError, match=r"did you mean (loss_scale|scale) or"):
        _ = dt.LossScaler("bf16").loss_scal
    with pytest.raises(AttributeError, match="did you mean save_checkpoint or"):
        _ = dt.save_checkpoints
    with pytest.raises(AttributeError, match=r'^duotone\.torch has no attribute "_wanted"$'):
        _ = dt._wanted


def test_who_imports_duotone_alone_is_led_to_duotone_torch():
    with pytest.raises(AttributeError, match=r'duotone has no attribute "cast"; what trains stands in duotone\.torch'):
        _ = duotone.cast
    assert not hasattr(duotone, "__wrapped__")


def test_adamw_without_decay_is_adam():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 8)) for _ in range(2))
    optimizers = dt.AdamW([ours], lr=0.1, weight_decay=0.0), torch.optim.Adam([theirs], lr=0.1)
    for _ in range(5):
        ours.grad, theirs.grad = ours.detach().square(), theirs.detach().square()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=2**-22)
