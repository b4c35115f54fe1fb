"""What a small number guards, as in `p + 1e-8` and `x / (std + 1e-8)`: gradients where 16 bits have 0.

    y = p + 1e-8,  y = x / d        in FP32

There the gradient may be 1e8 whatever the loss scale is. What made the 0, such as a softmax or a mask, multiplies it by
0, and Inf would be NaN. So a gradient that is beyond 16 bits where `p` or `x` is 0 is taken as the largest number: of a
quotient, divided by how many elements have one divisor, for those add up in the gradient of their mean. Elsewhere a
gradient overflows as always. Kept for the backward pass is what torch keeps, in its dtype.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from duotone.torch.casting.float32_inside.autograd_function import apply


def widen_guarded(x: Tensor) -> Tensor:
    """Widen a 16-bit tensor that a small number is added to.

    >>> p = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    >>> (widen_guarded(p) + 1e-8).log().sum().backward()
    >>> p.grad
    tensor([65504.], dtype=torch.float16)
    """
    return apply(_Widen, x)


def needs_guard(x: Any, divisor: Any) -> bool:
    """Return whether a quotient is one of FP16 by FP32 that has a gradient, or whose divisor torch would round.

    >>> needs_guard(torch.ones(2).half(), torch.tensor(1e-8)), needs_guard(torch.ones(2).half(), torch.ones(2))
    (True, False)
    """
    if not (isinstance(x, Tensor) and isinstance(divisor, Tensor)):
        return False
    if x.dtype is not torch.float16 or divisor.dtype is not torch.float32 or x.layout is not torch.strided:
        return False
    if x.is_nested or x.device != divisor.device:
        return False
    return (not divisor.dim() and x.dim() > 0) or (torch.is_grad_enabled() and x.requires_grad)


def divide_guarded(x: Tensor, divisor: Tensor) -> Tensor:
    """Divide FP16 by FP32, in FP32; rounded to FP16 if the divisor has no dimensions, as torch's quotient is.

    >>> x = torch.zeros(2, dtype=torch.float16, requires_grad=True)
    >>> y = divide_guarded(x, torch.full((2,), 1e-8))
    >>> y.sum().backward()
    >>> y.dtype, x.grad
    (torch.float32, tensor([65504., 65504.], dtype=torch.float16))
    """
    return apply(_Divide, x, divisor)


class _Widen(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _rounded(grad, *ctx.saved_tensors)


class _Divide(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, divisor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        # beside a tensor with dimensions torch rounds one without
        return (x.float() / divisor).to(x.dtype) if x.dim() and not divisor.dim() else x / divisor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, divisor = ctx.saved_tensors
        grad = grad.float()
        of_x = of_divisor = None
        if ctx.needs_input_grad[0]:
            sharing = max(1, x.numel() // max(1, divisor.numel()))
            # half of it, for each is rounded before they are added up
            of_x = _rounded((grad / divisor).sum_to_size(x.shape), x, 1 if sharing == 1 else 2 * sharing)
        if ctx.needs_input_grad[1]:
            # in torch's order
            of_divisor = (-grad * (x / divisor / divisor)).sum_to_size(divisor.shape)
        return of_x, of_divisor


def _rounded(grad: Tensor, x: Tensor, part: int = 1) -> Tensor:
    largest = torch.finfo(x.dtype).max
    is_guarded = (x == 0) & (grad.abs() > largest) & grad.isfinite()
    return torch.where(is_guarded, grad.clamp(-largest / part, largest / part), grad).to(x.dtype)
