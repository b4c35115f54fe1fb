"""The step's operations in Triton, for CUDA devices: `reference.py`, bit for bit, in one pass over memory.

Kernels read a table of raw addresses, so that a step is one launch for coefficients and one for all
that is stored alike,
however many parameters there are. Nothing here waits for the device. A step may be captured in a CUDA graph once one
has run eagerly, which compiles the kernels. Triton's interpreter runs the same kernels on CPU tensors in tests; speed,
graphs and streams have not been measured on a GPU yet.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from duotone.torch.kernels.cuda import launch
from duotone.torch.kernels.operands import AverageBatch, Edits, Operand
from duotone.torch.kernels.updates.definition import Update

__all__ = ["average", "grad_stats", "update"]


def grad_stats(grads: Sequence[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of the true gradient and `found_inf`, as `reference.grad_stats` does."""
    return launch.sum_of_squares(grads, inverse_scale)


def update(
    definition: Update,
    operands: Sequence[Operand],
    settings: Sequence[Any],
    grad_multiplier: Tensor,
    found_inf: Tensor,
    edits: Edits | None = None,
) -> None:
    """Update in place by one step of an optimizer, as `reference.update` does, each operand dense in one layout."""
    launch.update(definition, operands, settings, grad_multiplier, found_inf, edits)


def average(batch: AverageBatch, share: Tensor, skipped: Tensor) -> None:
    """Move averages towards masters, as `reference.average` does, each operand dense in one layout."""
    launch.average(batch, share, skipped)
