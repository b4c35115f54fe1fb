"""Quantization-aware training of 16-bit data: observed and quantized in FP32, `y = round16(grid(x))`.

torch's fused form, which quantization-aware training takes by default, has FP32 kernels alone. It writes into its
observer's buffers, FP32 as torch makes them: where these are 16-bit, what it has written is rounded into them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from duotone.torch.casting.widened import call_widened

_NARROW = (torch.bfloat16, torch.float16)


def observe_and_quantize_in_float32(func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call `torch.fused_moving_avg_obs_fake_quant` with FP32 inside.

    Args:
        func: the function; its arguments follow.

    Returns:
        The data on the grid, in their dtype.

    >>> x, (on, low, high, step) = torch.tensor([0.1, 0.3]).half(), torch.ones(4, 1)
    >>> flags, zero, rest = (on.long(), on.long()), torch.zeros(1, dtype=torch.int32), (0.1, 0, 3, -1, False, False)
    >>> y = observe_and_quantize_in_float32(
    ...     torch.fused_moving_avg_obs_fake_quant, x, *flags, low, high, step, zero, *rest
    ... )
    >>> y.dtype, high.item() < 1
    (torch.float16, True)
    """
    wide = [arg.float() if isinstance(arg, Tensor) and arg.dtype in _NARROW else arg for arg in args]
    result = input.dtype if input.dtype in _NARROW else None
    y = call_widened(lambda data: func(data, *wide, **kwargs), (input,), {}, result=result)
    for buffer, written in zip(args, wide, strict=True):
        if buffer is not written:
            buffer.copy_(written)
    return y
