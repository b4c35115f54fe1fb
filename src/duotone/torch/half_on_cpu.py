"""FP16 storage with FP32 arithmetic on CPUs that have no FP16 matrix product.

Such CPUs emulate FP16 products several times slower than FP32 ones. Here the operands of a product, a convolution
or an attention are rounded to FP16, widened, multiplied in FP32 and the result rounded once to FP16, which is what a
tensor core does. Autograd sees the conversions, so the backward products take the same way without any mode around it.
Left out: keeping the widened operands out of what is saved for backward, and recurrent cells.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duotone.errors import DuotoneWarning
from duotone.torch.nested import map_tensors

PRODUCTS = frozenset(
    {
        F.linear,
        F.bilinear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.scaled_dot_product_attention,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.mv,
        torch.addmm,
        torch.baddbmm,
        torch.einsum,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
        Tensor.mm,
        Tensor.bmm,
        Tensor.mv,
        Tensor.addmm,
        Tensor.baddbmm,
    }
)


def cpu_has_half_products() -> bool:
    """Return whether this CPU multiplies matrices in FP16 itself."""
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


@functools.cache
def say_once_how_half_runs_on_cpu() -> None:
    """Warn, the first time, if FP16 products on this CPU run in FP32 arithmetic."""
    if not cpu_has_half_products():
        warnings.warn(
            "this CPU has no FP16 matrix products: they run in FP32 arithmetic on FP16 values, at FP32's speed; "
            'policy "bf16" is the faster choice where the CPU has BF16',
            DuotoneWarning,
            stacklevel=3,
        )


def multiply_in_float32(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Call a product on operands rounded to FP16 and widened to FP32, and round its result to FP16.

    Args:
        func: one of `PRODUCTS`.
        args: its arguments, tensors in any dtype; integer, boolean and FP64 ones stay as they are.
        kwargs: its named arguments.

    >>> ones = torch.ones(1, 4096, dtype=torch.float16)
    >>> multiply_in_float32(torch.matmul, (ones, ones.T), {})
    tensor([[4096.]], dtype=torch.float16)
    """
    with torch.autocast("cpu", enabled=False):
        product = func(*map_tensors(_widen, args), **map_tensors(_widen, dict(kwargs)))
        # integers and FP64 stay what they are, as under autocast
        return product.to(torch.float16) if product.dtype == torch.float32 else product


def _widen(tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return tensor
    return tensor.to(torch.float16).to(torch.float32)
