"""How much the masters count in one update of an average: its share, 1 - decay, by how many updates there were.

With `n` updates before this one, counted from 0, and in FP64, rounded once to FP32:

- a constant decay: 1 for n = 0, then `1 - decay`;
- a warm-up: `max((1 + n / warmup_gamma)^-warmup_power, 1 - decay)`, as ema-pytorch (`inv_gamma`, `power`), diffusers'
  `EMAModel` (`use_ema_warmup`) and timm's `ModelEmaV3` (`use_warmup`) have it;
- no decay: `1 / (n + 1)`, by which all updates count alike: Izmailov et al., "Averaging weights leads to wider optima
  and better generalization" (1803.05407).

So the first update takes the masters as they are, whatever was there. Left out: a decay that changes otherwise, and
TensorFlow's `(1 + n) / (10 + n)`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.errors import AverageError


@dataclass(frozen=True)
class Schedule:
    """The settings of an average.

    Attributes:
        decay: what stays of the average in an update, from 0 on and below 1; None for equal shares.
        warmup_power: how fast the decay rises to that; None for no warm-up.
        warmup_gamma: by how many updates the warm-up is stretched.

    Raises:
        AverageError: one of them is out of range, or there is a warm-up without a decay.

    >>> schedule = Schedule(0.9, warmup_power=1.0)
    >>> [round(schedule.share(torch.tensor(n)).item(), 3) for n in (0, 1, 4, 100)]
    [1.0, 0.5, 0.2, 0.1]
    """

    decay: float | None
    warmup_power: float | None = None
    warmup_gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.decay is not None and not 0.0 <= self.decay < 1.0:
            raise AverageError(
                f"decay is {self.decay}; it must be from 0 on and below 1, such as 0.999, or None for an average in "
                "which every update counts alike"
            )
        if self.warmup_power is not None and not self.warmup_power > 0.0:
            raise AverageError(f"warmup_power is {self.warmup_power}; it must be positive, or None for no warm-up")
        if not self.warmup_gamma > 0.0:
            raise AverageError(f"warmup_gamma is {self.warmup_gamma}; it must be positive")
        if self.decay is None and self.warmup_power is not None:
            raise AverageError("warmup_power is given, but with decay=None there is no decay to warm up; leave it out")

    def share(self, updates: Tensor) -> Tensor:
        """Return how much the next update counts.

        Args:
            updates: int64, 0-d: how many there were.

        Returns:
            FP32, 0-d, on the same device, which is not waited for.
        """
        if updates.is_cpu:
            # one operation of torch takes longer than all of these
            return torch.full((), self._on_host(updates.item()), dtype=torch.float32, device="cpu")
        if self.decay is None:
            return (updates.double() + 1.0).reciprocal().float()
        if self.warmup_power is None:
            share = (updates == 0).double()
        else:
            share = (updates.double() / self.warmup_gamma + 1.0).pow(-self.warmup_power)
        return share.clamp(min=1.0 - self.decay).float()

    def _on_host(self, updates: float) -> float:
        if self.decay is None:
            return 1.0 / (updates + 1.0)
        if self.warmup_power is None:
            share = float(updates == 0)
        else:
            share = (updates / self.warmup_gamma + 1.0) ** -self.warmup_power
        return max(share, 1.0 - self.decay)
