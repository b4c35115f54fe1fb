"""The losses of one step, and which of them was the first that is Inf or NaN before it is scaled.

On an accelerator that is a device scalar, which nobody waits for. A loss that is computed from a scaled one, a gradient
penalty for instance, may overflow because of the scale, and is not checked.
"""

import math

import torch
from torch import Tensor

from duotone.torch.internals.autograd import in_transform


class Losses:
    """The losses that were scaled since the last step.

    Attributes:
        count: how many.

    >>> losses = Losses()
    >>> for value in (1.0, torch.nan, torch.inf):
    ...     losses.add(torch.tensor(value), on_host=True)
    >>> losses.count, losses.first_non_finite(torch.device("cpu"), on_host=True)
    (3, 2)
    >>> losses.any_non_finite(torch.device("cpu"))
    tensor(True)
    """

    def __init__(self) -> None:
        self.count = 0
        # its number, from 1 on; 0 for none
        self._first_non_finite: int | Tensor = 0
        self._ignores_later = False

    def add(self, loss: Tensor, *, on_host: bool) -> None:
        """Count a loss, and check whether it is finite.

        Args:
            loss: before it is scaled, of any shape.
            on_host: whether it can be read without waiting.
        """
        self.count += 1
        # a tracer has no values, and inside of vmap and its like a loss has no one value
        is_traced = torch.compiler.is_compiling() or in_transform()
        if is_traced or self._ignores_later:
            return
        if on_host:
            finite = math.isfinite(loss.item()) if loss.numel() == 1 else bool(loss.isfinite().all())
            if not finite and not self._first_non_finite:
                self._first_non_finite = self.count
            return
        loss = loss.detach()
        if not isinstance(self._first_non_finite, int):
            earlier = self._first_non_finite.to(loss.device)
            self._first_non_finite = torch.where((earlier != 0) | loss.isfinite().all(), earlier, self.count)
        elif not self._first_non_finite:
            self._first_non_finite = torch.where(loss.isfinite().all(), 0, self.count)

    def ignore_later(self) -> None:
        """Check no later loss of this step: the caller has a scaled loss, from which later ones may be computed."""
        self._ignores_later = True

    def any_non_finite(self, device: torch.device) -> Tensor:
        """Return whether one was Inf or NaN: bool, 0-d, on a device."""
        if isinstance(self._first_non_finite, Tensor):
            return self._first_non_finite.to(device) != 0
        # filled on the device: a copy from the host would wait for it
        return torch.full((), self._first_non_finite != 0, device=device)

    def first_non_finite(self, device: torch.device, *, on_host: bool) -> int | Tensor:
        """Return which was the first that is Inf or NaN, from 1 on, or 0: a number, or a 0-d tensor on the device."""
        if not isinstance(self._first_non_finite, Tensor):
            return self._first_non_finite
        return int(self._first_non_finite.item()) if on_host else self._first_non_finite.to(device)
