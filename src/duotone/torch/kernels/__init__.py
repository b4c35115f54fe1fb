"""The operations of an optimizer step and of averages, one signature for every backend, chosen by device.

`reference` is plain torch, runs anywhere and defines the bits. `cpu` (compiled by Numba) and `cuda` (Triton) equal it
bit for bit, one launch over all parameters that are stored alike. What an update computes stands in `updates`, a file
for each optimizer.
"""

from duotone.torch.kernels.codec import SPLIT_DTYPES, decode, encode
from duotone.torch.kernels.dispatch import (
    Backend,
    average,
    check_backend,
    grad_numbers,
    grad_stats,
    has_fused_kernels,
    update,
)
from duotone.torch.kernels.gradients import GradBatch, batch_of
from duotone.torch.kernels.layout import is_contiguous
from duotone.torch.kernels.operands import AverageBatch, AverageOperand, Batch, Edits, Operand, Rounding
from duotone.torch.kernels.uncompiled import uncompiled
from duotone.torch.kernels.updates.definition import Update

__all__ = [
    "SPLIT_DTYPES",
    "AverageBatch",
    "AverageOperand",
    "Backend",
    "Batch",
    "Edits",
    "GradBatch",
    "Operand",
    "Rounding",
    "Update",
    "average",
    "batch_of",
    "check_backend",
    "decode",
    "encode",
    "grad_numbers",
    "grad_stats",
    "has_fused_kernels",
    "is_contiguous",
    "uncompiled",
    "update",
]
