"""The losses of one step, and which of them was the first that is not a finite number before it is scaled.

On an accelerator that is a device scalar, which nobody waits for. What is computed from a loss that was scaled already,
a gradient penalty for instance, may overflow for the sake of the scale, and is not looked at.
"""

import math
from typing import Any

import torch
from torch import Tensor


class Losses:
    """The losses that were scaled since the last step.

    Attributes:
        count: how many.

    >>> losses = Losses()
    >>> for value in (1.0, torch.nan, torch.inf):
    ...     losses.add(torch.tensor(value), on_host=True)
    >>> losses.count, losses.first_bad(torch.device("cpu"), on_host=True), losses.is_bad(torch.device("cpu"))
    (3, 2, tensor(True))
    """

    def __init__(self) -> None:
        self.count = 0
        # its number, from 1 on; 0 for none
        self._first_bad: int | Tensor = 0
        self._is_given_away = False

    def add(self, loss: Tensor, *, on_host: bool) -> None:
        """Count a loss, and look at it.

        Args:
            loss: before it is scaled, of any shape.
            on_host: whether it can be read without waiting.
        """
        self.count += 1
        # a tracer has no values, and inside of vmap and its like a loss has no one value
        is_traced = torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None  # type: ignore[attr-defined]
        if is_traced or self._is_given_away:
            return
        if on_host:
            finite = math.isfinite(loss.item()) if loss.numel() == 1 else bool(loss.isfinite().all())
            if not finite and not self._first_bad:
                self._first_bad = self.count
            return
        loss = loss.detach()
        if not isinstance(self._first_bad, int):
            earlier = self._first_bad.to(loss.device)
            self._first_bad = torch.where((earlier != 0) | loss.isfinite().all(), earlier, self.count)
        elif not self._first_bad:
            self._first_bad = torch.where(loss.isfinite().all(), 0, self.count)

    def give_away(self) -> None:
        """Take note that a scaled loss is in other hands, so that later ones of this step may come from it."""
        self._is_given_away = True

    def is_bad(self, device: torch.device) -> Tensor:
        """Return whether one was Inf or NaN: bool, 0-d, on a device."""
        if isinstance(self._first_bad, Tensor):
            return self._first_bad.to(device) != 0
        # filled on the device: a copy from the host would wait for it
        return torch.full((), self._first_bad != 0, device=device)

    def first_bad(self, device: torch.device, *, on_host: bool) -> Any:
        """Return which was the first that is Inf or NaN, from 1 on, or 0: a number, or a 0-d tensor on the device."""
        if not isinstance(self._first_bad, Tensor):
            return self._first_bad
        return self._first_bad.item() if on_host else self._first_bad.to(device)
