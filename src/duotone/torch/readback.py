"""Device scalars that reach the host one step later, so that the host never waits for work that it has just queued.

What is sent is copied into pinned memory behind the work that computes it. When the next step begins, the device has
long written it: receiving waits for that copy alone, while the work queued after it keeps the device busy. On a CPU
what is sent is there at once.
"""

from typing import Any

import torch
from torch import Tensor


class Readback:
    """A few scalars on their way to the host, the last ones sent."""

    def __init__(self) -> None:
        self._sent: Tensor | None = None
        self._copied: torch.Event | None = None

    def send(self, values: Tensor) -> None:
        """Send scalars, 1-d, of any dtype; nothing is sent where a CUDA graph is being captured."""
        if values.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        if values.device.type == "cpu":
            self._sent, self._copied = values, None
            return
        self._sent = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        self._copied = torch.Event(values.device)
        self._copied.record()

    def receive(self) -> list[Any] | None:
        """Return the scalars that were sent last as Python numbers, once; None if there are none.

        >>> readback = Readback()
        >>> readback.send(torch.tensor([1, 0]))
        >>> readback.receive(), readback.receive()
        ([1, 0], None)
        """
        if self._sent is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        values, self._sent = self._sent.tolist(), None
        return values
