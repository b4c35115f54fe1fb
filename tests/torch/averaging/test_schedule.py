"""How much an update counts, beside the formulas of other libraries."""

import pytest
import torch

from duotone.errors import AverageError
from duotone.torch.averaging.schedule import Schedule


def ema_pytorch(step: int, decay: float, inv_gamma: float, power: float) -> float:
    """Return the decay as ema-pytorch 0.7 and diffusers 0.3x compute it, of a step that they count from 1 on."""
    epoch = max(step - 1, 0)
    value = 1 - (1 + epoch / inv_gamma) ** -power
    return 0.0 if epoch <= 0 else min(max(value, 0.0), decay)


@pytest.mark.parametrize(("decay", "power", "gamma"), [(0.999, 2 / 3, 1.0), (0.9, 0.75, 10.0), (0.0, 1.0, 1.0)])
def test_the_warm_up_is_that_of_others(decay, power, gamma):
    schedule = Schedule(decay, power, gamma)
    for updates in (0, 1, 2, 9, 1000, 10**6):
        expected = 1 - ema_pytorch(updates + 1, decay, gamma, power)
        assert schedule.share(torch.tensor(updates)).item() == pytest.approx(expected, rel=1e-6)


def test_the_first_update_takes_all_and_later_ones_what_the_decay_leaves():
    shares = [Schedule(0.999).share(torch.tensor(updates)) for updates in (0, 1, 50)]
    assert shares[0].item() == 1.0
    assert [share.dtype for share in shares] == [torch.float32] * 3
    # rounded once, from FP64
    assert shares[1].item() == shares[2].item() == torch.tensor(1 - 0.999, dtype=torch.float64).float().item()


def test_equal_shares():
    shares = [Schedule(None).share(torch.tensor(updates)).item() for updates in range(4)]
    assert shares == torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 4]).tolist()


@pytest.mark.parametrize("schedule", [Schedule(0.99), Schedule(0.99, 0.75, 3.0), Schedule(None)], ids=str)
def test_a_device_computes_the_same(schedule):
    # what is not on a CPU goes through operations of torch, FP64 there as here
    class Elsewhere(torch.Tensor):
        is_cpu = False

    for updates in (0, 1, 5, 10_000):
        count = torch.tensor(updates)
        assert schedule.share(count.as_subclass(Elsewhere)).item() == schedule.share(count).item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((1.0,), r"decay is 1\.0; it must be from 0 on and below 1"),
        ((-0.1,), r"decay is -0\.1"),
        ((float("nan"),), "decay is nan"),
        ((0.9, 0.0), r"warmup_power is 0\.0; it must be positive"),
        ((0.9, 1.0, 0.0), r"warmup_gamma is 0\.0; it must be positive"),
        ((None, 1.0), "with decay=None there is no decay to warm up"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(AverageError, match=message):
        Schedule(*settings)
