"""Settings on the device: a row of int64 per group, numbers as FP64 patterns, uploaded when one changes.

A learning rate that is a tensor on the device is named by its address and read in every step, so it may change without
an upload, and between replays of a captured graph.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duotone.torch.kernels.cuda.upload import Cache, upload

# a learning rate is a number, or lies at one of two addresses that are 0 otherwise; behind the seed are the settings
# between the first and the last two, in their order
LR, LR_FLOAT32, LR_FLOAT64, MAXIMIZE, SEED, FIRST_NUMBER = range(6)

_cache: Cache[tuple[bytes, torch.device], Tensor] = Cache(32)


def device_settings(settings: Sequence[Any], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Return the rows of all groups on a device, and the tensors that they name, which must outlive the launch."""
    rates = [_rate(group.lr, device) for group in settings]
    rows = b"".join([_row(group, rate) for group, rate in zip(settings, rates, strict=True)])
    on_device = _cache.get((rows, device), device, lambda: upload([np.frombuffer(rows, np.int64)], device)[0])
    return on_device, [rate for rate in rates if isinstance(rate, Tensor)]


def _rate(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """Return a learning rate as a number, or as a tensor that a kernel can read."""
    if not isinstance(lr, Tensor):
        return lr
    if lr.device == device:
        return lr if lr.dtype in (torch.float32, torch.float64) else lr.double()
    return lr.item() if lr.device.type == "cpu" else lr.to(device, torch.float64)


def _row(group: Any, rate: float | Tensor) -> bytes:
    if isinstance(rate, Tensor):
        addresses = (rate.data_ptr(), 0) if rate.dtype == torch.float32 else (0, rate.data_ptr())
        lr = (0.0, *addresses)
    else:
        lr = (rate, 0, 0)
    seed = (group.seed + 2**63) % 2**64 - 2**63
    numbers = group[1:-2]
    return struct.pack(f"<dqqqq{len(numbers)}d", *lr, group.maximize, seed, *numbers)
