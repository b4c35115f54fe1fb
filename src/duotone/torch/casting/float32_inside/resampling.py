"""`F.interpolate` of 16-bit images on CPUs, where torch lacks a 16-bit kernel or sums in 16 bits.

Antialiased resampling has none, and a mean over areas adds the gradients of areas that overlap in 16 bits: both run on
widened images and are rounded once. All other modes compute and sum in FP32 themselves.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from duotone.torch.casting.widened import widen_and_round


def interpolate_in_float32(
    func: Callable[..., Any],
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Call `F.interpolate` with FP32 inside.

    Args:
        func: `F.interpolate`; its arguments follow.

    Returns:
        The image in its new size, in the dtype of the old one.

    >>> from torch.nn import functional as F
    >>> import torch
    >>> image = torch.ones(1, 1, 8, 8, dtype=torch.bfloat16)
    >>> interpolate_in_float32(F.interpolate, image, (4, 4), mode="bilinear", antialias=True).dtype
    torch.bfloat16
    """
    args = (input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    return widen_and_round(func, args, {}) if antialias or mode == "area" else func(*args)
