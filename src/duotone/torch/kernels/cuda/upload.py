"""Small integer tables on the device: uploaded from pinned memory without waiting, and kept while they are of use.

A captured CUDA graph reads the same memory at every replay, so whatever a capture touches is never given back: pinned
memory that it copies from, and tables that were uploaded before. A table that is uploaded during a capture is filled by
the graph alone, so nothing outside of it may use it, and it is not cached. torch allocates pinned memory during a
capture, in the graph's own pool. None of this paragraph has been measured on a GPU yet.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

# what captured graphs read
_kept: list[object] = []


class Cache(Generic[Key, Value]):
    """The values that were asked for last, by key.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, device: torch.device, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made now if it is new.

        Args:
            key: what the value depends on, the device among it.
            device: where the value lies.
            make: uploads it.
        """
        capturing = is_capturing(device)
        value = self._values.get(key)
        if value is None:
            value = make()
            if not capturing:
                self._values[key] = value
                if len(self._values) > self._size:
                    self._values.popitem(last=False)
        else:
            self._values.move_to_end(key)
            if capturing:
                _kept.append(value)
        return value


def is_capturing(device: torch.device) -> bool:
    """Return whether work that is handed to the device now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Return int64 arrays as tensors on a device, copied in one go and without waiting for it.

    Each begins at a multiple of 16 bytes, so that a kernel is compiled once for all of them.
    """
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += array.size + array.size % 2
    # pageable memory would make the device wait, and the host with it
    staging = torch.empty(total, dtype=torch.int64, pin_memory=device.type == "cuda")
    for start, array in zip(starts, arrays, strict=True):
        staging[start : start + array.size] = torch.tensor(array).flatten()
    if is_capturing(device):
        _kept.append(staging)
    moved = staging.to(device, non_blocking=True)
    return [moved[start : start + array.size].view(array.shape) for start, array in zip(starts, arrays, strict=True)]
