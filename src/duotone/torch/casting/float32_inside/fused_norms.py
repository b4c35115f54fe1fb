"""LayerNorm and RMSNorm of 16-bit data with FP32 weights on CUDA, whose kernels of torch's take weights in 16 bits.

By Duotone's own kernels: FP32 inside, weights not rounded, nothing kept but `x` and 8 bytes of each row. They ran in
Triton's interpreter only, not yet on a GPU. Left out: rows of more than 8,192 numbers, transforms of torch.func,
forward-mode derivatives, torch.compile; there weights are cast to the dtype of the data.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from duotone.torch.casting.float32_inside.autograd_function import is_eager
from duotone.torch.casting.float32_inside.row_sums import grad_dtype_of
from duotone.torch.internals.autograd import in_forward_mode
from duotone.torch.kernels import has_fused_kernels

_NARROW = (torch.bfloat16, torch.float16)
# of a row; as in the kernels, which are imported where they run
_MOST_WIDTH = 8192


def takes(x: Tensor, shape: Sequence[int], *weights: Tensor | None) -> bool:
    """Return whether these kernels normalize `x` over its last dimensions, `shape`, with weights that are not None.

    >>> takes(torch.ones(2, 4).bfloat16(), (4,), torch.ones(4))
    False
    """
    return x.is_cuda and type(x) is Tensor and fits(x, shape, *weights) and has_fused_kernels(x.device)


def fits(x: Tensor, shape: Sequence[int], *weights: Tensor | None) -> bool:
    """Return whether they would on any device.

    >>> x = torch.ones(2, 4).bfloat16()
    >>> fits(x, (4,), torch.ones(4)), fits(x, (4,), None), fits(x, (4,), torch.ones(4).bfloat16())
    (True, False, False)
    """
    given = [weight for weight in weights if weight is not None]
    rows_are_whole = 0 < len(shape) <= x.dim() and tuple(x.shape[-len(shape) :]) == tuple(shape)
    return (
        bool(given)
        and x.dtype in _NARROW
        and all(weight.dtype == torch.float32 and tuple(weight.shape) == tuple(shape) for weight in given)
        and rows_are_whole
        and 0 < math.prod(shape) <= _MOST_WIDTH
        and x.numel() > 0
        and is_eager()
        and not in_forward_mode()
    )


class FusedNorm(Function):
    """Normalized data, and 8 bytes of each row that their gradient needs."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, is_rms: bool
    ) -> tuple[Tensor, Tensor]:
        from duotone.torch.kernels.cuda.norms import normalize

        y, kept = normalize(_rows(x, shape), _flat(weight), _flat(bias), eps, is_rms=is_rms)
        return y.view(x.shape), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.shape, weight, bias, ctx.eps, ctx.is_rms = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, bias, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from duotone.torch.kernels.cuda.norms import gradients

        x, weight, bias, kept = ctx.saved_tensors
        of_x, _, of_weight, of_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or grad_dtype_of(x) != x.dtype:
            # as torch differentiates FP32 operands, second derivatives included
            with torch.enable_grad():
                y = (
                    F.rms_norm(x.float(), ctx.shape, weight, ctx.eps)
                    if ctx.is_rms
                    else F.layer_norm(x.float(), ctx.shape, weight, bias, ctx.eps)
                )
            operands = (x, of_x), (weight, of_weight), (bias, of_bias)
            chosen = [each for each, is_wanted in operands if is_wanted]
            found = iter(torch.autograd.grad(y, chosen, grad.float(), create_graph=torch.is_grad_enabled()))
            of = [next(found) if is_wanted else None for _, is_wanted in operands]
        else:
            rows = _rows(grad, ctx.shape), _rows(x, ctx.shape)
            computed = gradients(*rows, _flat(weight), kept, (of_x, of_weight, of_bias), is_rms=ctx.is_rms)
            of = [
                None if each is None else each.view(s)
                for each, s in zip(computed, (x.shape, *[ctx.shape] * 2), strict=True)
            ]
        return of[0], None, of[1], of[2], None, None


def _rows(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.reshape(-1, math.prod(shape)).contiguous()


def _flat(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.reshape(-1).contiguous()
