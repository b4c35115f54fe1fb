"""What became of one step, as a record; on its way from a device to the host it is one tensor."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# the fields that a device computes, in the order of the tensor, and what they are on the host; the flags of the
# optimizers come after them
_SENT = {
    "loss_scale": float,
    "skipped_in_a_row": int,
    "search": int,
    "non_finite_loss": int,
    "any_non_finite_loss": bool,
}


class Outcome(NamedTuple):
    """What became of one step: Python numbers, or, but for the step's own number, 0-d tensors on a device.

    Attributes:
        step: its number, from 1 on.
        loss_scale: what its losses were multiplied by.
        skipped_in_a_row: steps skipped up to this one; 0 if it was not.
        non_finite_loss: which of its losses, from 1 on, was the first that is Inf or NaN; 0 for none on this rank.
        any_non_finite_loss: whether a loss was Inf or NaN on any rank.
        skipped_each: for each optimizer, whether it skipped.
        search: of the loss scale, as `LossScaleState` has it after the step.
    """

    step: int
    loss_scale: Any
    skipped_in_a_row: Any
    non_finite_loss: Any
    any_non_finite_loss: Any
    skipped_each: Sequence[Any]
    search: Any = 0

    @property
    def is_on_device(self) -> bool:
        """Whether the host has yet to read it."""
        return isinstance(self.loss_scale, Tensor)

    def to_tensor(self) -> Tensor:
        """Return all but the step's number as one tensor, FP64, 1-d, on the device; every field is exact in FP64."""
        device = self.loss_scale.device
        values = [*(getattr(self, name) for name in _SENT), *self.skipped_each]
        return torch.stack([_as_float64(value, device) for value in values])

    def with_values(self, values: Sequence[float]) -> "Outcome":
        """Return the outcome in Python numbers, given the values of `to_tensor`.

        >>> outcome = Outcome(7, *map(torch.tensor, (8.0, 1, 0, False)), [torch.tensor(True)])
        >>> outcome.with_values(outcome.to_tensor().tolist())
        Outcome(step=7, loss_scale=8.0, skipped_in_a_row=1, non_finite_loss=0, ..., skipped_each=[True], search=0)
        """
        fields = {name: kind(value) for (name, kind), value in zip(_SENT.items(), values, strict=False)}
        return Outcome(self.step, **fields, skipped_each=list(map(bool, values[len(_SENT) :])))


def _as_float64(value: Any, device: torch.device) -> Tensor:
    # filled on the device: a copy from the host would wait for it
    return value.double() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)
