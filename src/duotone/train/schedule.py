"""The learning rate: linear warm-up, then a cosine, counted in steps that were not skipped.

`lr(t) = peak * (t + 1) / (warmup + 1)` for `t < warmup`, then
`lr(t) = peak * (f + (1 - f) * (1 + cos(pi * (t - warmup) / (steps - warmup))) / 2)`, with `f` the final fraction
(Loshchilov and Hutter, 1608.03983, without restarts). The count lives on the device, so holding it still when a step
is skipped waits for nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor


class WarmupCosine:
    """Sets the learning rate of every parameter group, on the device.

    Args:
        optimizer: takes learning rates as tensors, as Duotone's do.
        device: of the parameters.
        peak: the highest learning rate.
        warmup_steps: steps until it is reached.
        steps: where the cosine ends; it stays there.
        final_fraction: of the peak, where it ends.

    >>> parameter = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.SGD([parameter], lr=0.0)
    >>> schedule = WarmupCosine(optimizer, torch.device("cpu"), peak=1.0, warmup_steps=1, steps=3, final_fraction=0.0)
    >>> rates = []
    >>> for skipped in (False, True, False, False):
    ...     rates.append(round(schedule.learning_rate.item(), 3))
    ...     schedule.advance(torch.tensor(skipped))
    >>> rates
    [0.5, 1.0, 1.0, 0.5]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        peak: float,
        warmup_steps: int,
        steps: int,
        final_fraction: float,
    ) -> None:
        self._peak = peak
        self._warmup_steps = warmup_steps
        self._cosine_steps = max(1, steps - warmup_steps)
        self._final_fraction = final_fraction
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._optimizer = optimizer
        self.learning_rate = torch.zeros((), dtype=torch.float64, device=device)
        self._set()

    def advance(self, skipped: Tensor) -> None:
        """Move on by one step unless it was skipped: bool, 0-d, on the device."""
        self._count += ~skipped
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Return the count of steps that were not skipped."""
        return {"count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, and the learning rate that follows from it."""
        self._count.copy_(state_dict["count"])
        self._set()

    def _set(self) -> None:
        warmup = (self._count + 1).double() / (self._warmup_steps + 1)
        position = ((self._count - self._warmup_steps).double() / self._cosine_steps).clamp(0.0, 1.0)
        cosine = self._final_fraction + (1.0 - self._final_fraction) * (1.0 + torch.cos(math.pi * position)) / 2
        self.learning_rate.copy_(self._peak * torch.where(self._count < self._warmup_steps, warmup, cosine))
        # all groups share one tensor, also after an optimizer has loaded groups of its own
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
