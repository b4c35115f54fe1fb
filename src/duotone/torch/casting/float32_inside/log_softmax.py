"""Log-softmax of 16-bit data in FP32, and its gradient: `grad_x = grad - softmax(x) * sum(grad)`, rounded once.

torch takes the softmax in it from the rounded result: `exp` of a BF16 number near -10 is off by 3 %, and of a row of
70,000 by a quarter in sum. Here `x` is kept in its 16 bits in place of the result, and log-softmax is computed again.
Left out: forward-mode derivatives.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from duotone.torch.casting.float32_inside.autograd_function import apply
from duotone.torch.casting.float32_inside.gathers import needs_sum


class _LogSoftmax(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.log_softmax(x, dim, dtype=torch.float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        grad = grad.float()
        return grad - torch.softmax(x.float(), ctx.dim) * grad.sum(ctx.dim, keepdim=True), None


def log_softmax_in_float32(
    func: Callable[..., Any],
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Call `F.log_softmax` in FP32.

    Args:
        func: `F.log_softmax`; its arguments follow.

    Returns:
        Log-probabilities, in FP32 unless another dtype is asked for.

    >>> from torch.nn import functional as F
    >>> x = torch.zeros(1000, dtype=torch.bfloat16, requires_grad=True)
    >>> log_softmax_in_float32(F.log_softmax, x, 0)[0].backward()
    >>> x.grad[1].item()
    -0.00099945068359375
    """
    if dtype is not None or dim is None or not needs_sum(input):
        return func(input, dim, _stacklevel, _or_float32(dtype, input))
    return apply(_LogSoftmax, input, dim)


def log_softmax_of(
    func: Callable[..., Any], input: Tensor, dim: int, dtype: torch.dtype | None = None, **named: Any
) -> Tensor:
    """Call `torch.log_softmax`, the method, `torch.special.log_softmax` or the operator in FP32.

    Args:
        func: the function; its arguments follow.
    """
    if dtype is not None or named or not needs_sum(input):
        # what is written into has its dtype
        return func(input, dim, dtype=dtype if named else _or_float32(dtype, input), **named)
    return apply(_LogSoftmax, input, dim)


def _or_float32(dtype: torch.dtype | None, input: Tensor) -> torch.dtype | None:
    return torch.float32 if dtype is None and input.dtype in (torch.bfloat16, torch.float16) else dtype
