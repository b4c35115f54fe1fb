"""The operations of an optimizer step, one signature for every backend, chosen by device.

`reference` is plain torch, runs anywhere and defines the bits. `cpu` (compiled by Numba) and `cuda` (Triton) equal it
bit for bit, one launch over all parameters of one form.
"""

from duotone.torch.kernels.codec import SPLIT_DTYPES, decode, encode
from duotone.torch.kernels.dispatch import Backend, adamw, check_backend, grad_stats, lion, sgd
from duotone.torch.kernels.layout import is_contiguous
from duotone.torch.kernels.operands import AdamWSettings, Batch, LionSettings, Operand, Rounding, SGDSettings
from duotone.torch.kernels.uncompiled import uncompiled

__all__ = [
    "SPLIT_DTYPES",
    "AdamWSettings",
    "Backend",
    "Batch",
    "LionSettings",
    "Operand",
    "Rounding",
    "SGDSettings",
    "adamw",
    "check_backend",
    "decode",
    "encode",
    "grad_stats",
    "is_contiguous",
    "lion",
    "sgd",
    "uncompiled",
]
