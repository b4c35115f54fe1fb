"""LayerNorm and RMSNorm of 16-bit data, computed in FP32: `y = round16((x - mean) * rstd * weight + bias)`.

Kept for the backward pass are `x` in its 16 bits and one FP32 mean and `rstd` per row, nothing of the size of `x`.
Gradients are rounded once to each operand's dtype, or not at all where its `grad_dtype` says so. torch 2.13 on CPUs
sums the gradients of a LayerNorm's weight and bias in 16 bits, rounds the mean and `rstd` of norms whose weights are
16-bit or absent, and keeps FP32 copies in `rms_norm`. So LayerNorm gets FP32 weights beside 16-bit data, for which its
kernel's results differ from FP32's rounded once in one element of some thousands, and its sums are taken here;
RMSNorm's results are those of FP32, rounded once. CUDA's kernels compute in FP32 but take one dtype: `fused_norms` has
Duotone's own there, and elsewhere weights are cast to that of `x`. vmap's kernels take one dtype, too, and so do
forward-mode derivatives: inside of them all of it is FP32. The other norms are in `channel_norms`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from duotone.torch.casting.float32_inside import fused_norms
from duotone.torch.casting.float32_inside.autograd_function import apply, is_eager, leaves_gradients_to_torch
from duotone.torch.casting.float32_inside.row_sums import grad_dtype_of
from duotone.torch.internals.autograd import is_batched, transforms_are_active

NARROW = (torch.bfloat16, torch.float16)
# widened at a time: 1 MiB of FP32 stays in a CPU's caches, and no FP32 copy of the whole exists
_ELEMENTS = 2**18
_BACKWARD = torch.ops.aten.native_layer_norm_backward.default


class _LayerNorm(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if takes_one_dtype(x, weight, bias):
            y, mean, rstd = torch.native_layer_norm(x.float(), shape, widened(weight), widened(bias), eps)
            return y.to(x.dtype), mean, rstd
        return torch.native_layer_norm(x, shape, *_beside(x, shape, weight, bias), eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.shape, weight, bias, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # once: a second look would run a checkpointed part again
        x, weight, bias, mean, rstd = saved = ctx.saved_tensors
        of_x, _, of_weight, of_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or takes_one_dtype(grad, x, weight) or grad_dtype_of(x) != x.dtype:
            # as torch differentiates FP32 operands, second derivatives included
            wide = (grad.float(), x.float(), ctx.shape, mean, rstd, widened(weight), widened(bias))
            grad_x, grad_weight, grad_bias = _BACKWARD(*wide, [of_x, of_weight, of_bias])
            return grad_x, None, grad_weight, grad_bias, None
        grad_x = None
        if of_x:
            weight_and_bias = _beside(x, ctx.shape, weight, bias)
            grad_x = _BACKWARD(grad, x, ctx.shape, mean, rstd, *weight_and_bias, [True, False, False])[0]
        if not of_weight and not of_bias:
            return grad_x, None, None, None, None
        return grad_x, None, *_sums_over_rows(ctx, grad, *saved)


def _beside(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return FP32 weights to stand beside 16-bit data: only then does torch's kernel keep FP32 means."""
    weight = x.new_ones(shape, dtype=torch.float32) if weight is None else weight.float()
    return weight, torch.zeros_like(weight) if bias is None else bias.float()


def _sums_over_rows(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    """Return the gradients of weight and bias, a few rows widened at a time; the last is that of eps."""
    wanted = [False, *ctx.needs_input_grad[2:4]]
    weight, bias = (None if each is None else each.float().reshape(-1) for each in (weight, bias))
    rows, grads = (each.reshape(-1, math.prod(ctx.shape)) for each in (x, grad))
    means, rstds = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    count = max(1, _ELEMENTS // max(1, rows.shape[1]))
    # all at once in a program, which is made for any number of rows
    starts = range(0, max(1, len(rows)), count) if is_eager() else None
    sums: list[Tensor | None] = [None, None]
    for some in [slice(None)] if starts is None else [slice(first, first + count) for first in starts]:
        parts = _BACKWARD(
            grads[some].float(), rows[some].float(), rows.shape[1:], means[some], rstds[some], weight, bias, wanted
        )[1:]
        sums = [part if total is None else total.add_(part) for total, part in zip(sums, parts, strict=True)]
    grad_weight, grad_bias = (None if total is None else total.view(ctx.shape) for total in sums)
    return grad_weight, grad_bias, None


class _RMSNorm(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor, rank: int, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        wide = x.float()
        rstd = _rstd(wide, rank, eps)
        y = wide * rstd if weight is None else wide * rstd * weight
        return y.to(x.dtype), rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.rank, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, rstd = ctx.saved_tensors
        grad_x = grad_weight = None
        wide, grad = x.float(), grad.float()
        # a second derivative goes through rstd, which was kept as a constant
        if torch.is_grad_enabled():
            rstd = _rstd(wide, ctx.rank, ctx.eps)
        unit = wide * rstd
        if ctx.needs_input_grad[0]:
            of_unit = grad if weight is None else grad * weight
            grad_x = rstd * (of_unit - unit * (of_unit * unit).mean(_last(ctx.rank), keepdim=True))
        if weight is not None and ctx.needs_input_grad[2]:
            grad_weight = (grad * unit).sum_to_size(weight.shape)
        return grad_x, None, grad_weight, None


def layer_norm_in_float32(
    func: Callable[..., Any],
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
    **named: Any,
) -> Tensor:
    """Call `F.layer_norm` with FP32 inside.

    Args:
        func: `F.layer_norm` or `torch.layer_norm`; its arguments follow. Data and weights may differ in dtype.

    Returns:
        The normalized data, in their dtype.

    >>> from torch.nn import functional as F
    >>> x, bias = torch.ones(1000, 4, dtype=torch.bfloat16), torch.zeros(4, requires_grad=True)
    >>> layer_norm_in_float32(F.layer_norm, x, (4,), bias=bias).sum(dtype=torch.float32).backward()
    >>> bias.grad.tolist()
    [1000.0, 1000.0, 1000.0, 1000.0]
    """
    dtype = input.dtype
    if fused_norms.takes(input, normalized_shape, weight, bias):
        return apply(fused_norms.FusedNorm, input, tuple(normalized_shape), weight, bias, eps, False)[0]
    if dtype not in NARROW or not input.is_cpu or input.is_nested:
        # nearly all have the dtype already, and a call takes longer than to look
        weight = weight if weight is None or weight.dtype is dtype else weight.to(dtype)
        bias = bias if bias is None or bias.dtype is dtype else bias.to(dtype)
        return func(input, normalized_shape, weight, bias, eps, *rest, **named)
    if takes_one_dtype(input, weight, bias):
        return func(input.float(), normalized_shape, widened(weight), widened(bias), eps, *rest, **named).to(dtype)
    if records(input, weight, bias):
        return apply(_LayerNorm, input, tuple(normalized_shape), weight, bias, eps)[0]
    return func(input, normalized_shape, *_beside(input, normalized_shape, weight, bias), eps, *rest, **named)


def rms_norm_in_float32(
    func: Callable[..., Any],
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Call `F.rms_norm` with FP32 inside; without `eps` it is that of FP32, as in torch's own call on 16-bit data.

    Args:
        func: `F.rms_norm` or `torch.rms_norm`; its arguments follow. Data and weight may differ in dtype.

    Returns:
        The normalized data, in their dtype.

    >>> from torch.nn import functional as F
    >>> rms_norm_in_float32(F.rms_norm, torch.full((1, 2), 3.0).half(), (2,), torch.ones(2))
    tensor([[1., 1.]], dtype=torch.float16)
    """
    dtype = input.dtype
    if fused_norms.takes(input, normalized_shape, weight):
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        return apply(fused_norms.FusedNorm, input, tuple(normalized_shape), weight, None, eps, True)[0]
    if dtype not in NARROW or not input.is_cpu:
        return func(input, normalized_shape, cast_weight(weight, dtype), eps)
    shape = tuple(normalized_shape)
    # a shape that does not fit is left to torch to refuse
    fits = shape and input.shape[-len(shape) :] == shape and (weight is None or tuple(weight.shape) == shape)
    if fits and records(input, weight) and not takes_one_dtype(input, weight):
        return apply(_RMSNorm, input, len(shape), weight, torch.finfo(torch.float32).eps if eps is None else eps)[0]
    return func(input.float(), normalized_shape, widened(weight), eps).to(dtype)


def _rstd(wide: Tensor, rank: int, eps: float) -> Tensor:
    return wide.pow(2).mean(_last(rank), keepdim=True).add(eps).rsqrt()


def _last(rank: int) -> tuple[int, ...]:
    return tuple(range(-rank, 0))


def takes_one_dtype(*operands: Tensor | None) -> bool:
    """Return whether a norm's kernels would be those of vmap, or forward-mode derivatives, which take one dtype.

    >>> takes_one_dtype(torch.ones(1)), torch.func.vmap(lambda x: x + takes_one_dtype(x))(torch.zeros(1))
    (False, tensor([1.]))
    """
    if leaves_gradients_to_torch():
        return True
    return transforms_are_active() and any(each is not None and is_batched(each) for each in operands)


def records(*operands: Tensor | None) -> bool:
    """Return whether autograd is to record what is done with tensors.

    >>> records(torch.ones(1), None), records(torch.ones(1, requires_grad=True))
    (False, True)
    """
    if torch.is_grad_enabled():
        # a loop is several times as fast as a generator here
        for each in operands:
            if each is not None and each.requires_grad:
                return True
    return False


def cast_weight(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast a norm's weight or bias, if it has one."""
    return None if weight is None else weight.to(dtype)


def widened(weight: Tensor | None) -> Tensor | None:
    """Widen a norm's weight or bias from 16 bits to FP32."""
    return weight.float() if weight is not None and weight.dtype in NARROW else weight
