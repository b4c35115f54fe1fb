"""Attention of BF16 data on CPUs that multiply BF16, forward and backward, by Duotone's own kernels; else torch's.

`softmax(scale * Q K^T) V` with scores, softmax and sums in FP32, and nothing of length x length kept: the operands, the
result and one number for each query are. What torch's kernel promises holds for this one; its results differ in the
last bits. Left to torch: masks other than a causal one, dropout, odd widths of heads, FP16, other
CPUs, a few queries only, fewer heads than threads where a gradient is wanted, and whatever looks on or transforms:
torch.compile, modes of the dispatcher, torch.func, subclasses of tensors, `sdpa_kernel` without flash attention. A
second derivative is that of the plain formula in FP32.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from duotone.torch.casting.float32_inside.autograd_function import apply, is_eager, leaves_gradients_to_torch
from duotone.torch.casting.float32_inside.norms import records
from duotone.torch.internals.autograd import is_jit_tracing
from duotone.torch.internals.dispatch import has_dispatch_modes
from duotone.torch.kernels.attention import attention_kernels

# below, laying keys out, or the way to the kernels in Python, takes longer than is saved
_FEW_QUERIES = 32
_LITTLE_WORK = 2**20
_WIDTHS = range(16, 257, 16)
_PLAIN = (Tensor, Parameter)


class _Attention(Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        return _kernels().forward(query, key, value, is_causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.is_causal, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, output, sums = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_eager() or has_dispatch_modes() or grad.dtype is not torch.bfloat16:
            grads = _differentiable(grad, query, key, value, ctx.is_causal, ctx.scale)
        else:
            grads = _kernels().backward(
                _with_dense_rows(grad), query, key, value, output, sums, ctx.is_causal, ctx.scale
            )
        return *grads, None, None


def attention(
    func: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call `F.scaled_dot_product_attention`, or what is faster and no less exact.

    Args:
        func: `F.scaled_dot_product_attention`; its arguments follow.

    >>> from torch.nn import functional as F
    >>> x = torch.ones(1, 2, 64, 16, dtype=torch.bfloat16)
    >>> attention(F.scaled_dot_product_attention, x, x, x, is_causal=True)[0, 0, 0, 0]
    tensor(1., dtype=torch.bfloat16)
    """
    if attn_mask is None and dropout_p == 0.0 and _is_served(query, key, value, scale, enable_gqa):
        operands = [_with_dense_rows(each) for each in (query, key, value)]
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        if records(query, key, value):
            return apply(_Attention, *operands, bool(is_causal), scale)[0]
        return _kernels().forward(*operands, bool(is_causal), scale)[0]
    # given only where it says something: older versions of torch, and functions in its place, may not know it
    named = {"enable_gqa": enable_gqa} if enable_gqa else {}
    return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **named)


def attend_on_cpu(
    cast: Callable[..., Any], func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call attention with cast operands: `attention`, or `func` itself in a graph, which knows no partial objects.

    Args:
        cast: calls a function with its operands cast; takes the three last arguments.
        func: `F.scaled_dot_product_attention`.
        args: its arguments.
        kwargs: its named arguments.
    """
    query, key = args[:2]
    # before the rest, at the price of few calls: small models make many
    is_large = type(query) in _PLAIN and type(key) in _PLAIN and _is_large(query.shape, key.shape)
    return cast(partial(attention, func) if is_large and not torch.compiler.is_compiling() else func, args, kwargs)


def _is_large(query: torch.Size, key: torch.Size) -> bool:
    if len(query) != 4 or len(key) != 4 or query[2] < _FEW_QUERIES:
        return False
    return query[0] * query[1] * query[2] * query[3] * key[2] >= _LITTLE_WORK


def _is_served(query: Any, key: Any, value: Any, scale: Any, enable_gqa: bool) -> bool:
    """Return whether the kernels take a call, and are faster: a rule by shapes, measured by benchmarks/attention.py."""
    for each in (query, key, value):
        if type(each) not in _PLAIN or each.dtype is not torch.bfloat16 or not each.is_cpu:
            return False
        if len(each.shape) != 4 or each.layout is not torch.strided:
            return False
    (batch, heads, _, width), (_, key_heads, keys, _) = query.shape, key.shape
    fits = key.shape == value.shape and key.shape[0] == batch and key.shape[3] == width and width in _WIDTHS
    if not fits or not _is_large(query.shape, key.shape) or not keys or not key_heads:
        return False
    is_grouped = heads != key_heads
    if is_grouped and (not enable_gqa or heads % key_heads):
        return False
    has_scale = scale is None or (isinstance(scale, int | float) and 0 < scale < math.inf)
    # a backward pass has a thread for each head of keys
    is_busy = not records(query, key, value) or batch * key_heads >= torch.get_num_threads()
    return has_scale and is_busy and _is_alone() and torch.backends.cuda.flash_sdp_enabled() and _kernels() is not None


def _is_alone() -> bool:
    """Return whether nothing looks on that kernels would hide from, and no other derivatives are wanted."""
    return is_eager() and not (leaves_gradients_to_torch() or has_dispatch_modes() or is_jit_tracing())


def _kernels() -> Any:
    return attention_kernels()


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """Return a tensor whose rows are dense, and of its own memory."""
    return tensor if tensor.stride(3) == 1 and not tensor.is_neg() else tensor.contiguous()


def _differentiable(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by operations that autograd follows, in FP32; it rounds them."""
    group = query.shape[1] // key.shape[1]
    wide_query, wide_grad = query.float(), grad.float()
    wide_key, wide_value = (each.float().repeat_interleave(group, 1) for each in (key, value))
    scores = scale * wide_query @ wide_key.transpose(2, 3)
    if is_causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    chances = scores.softmax(-1)
    grad_chances = wide_grad @ wide_value.transpose(2, 3)
    grad_scores = scale * chances * (grad_chances - (grad_chances * chances).sum(-1, keepdim=True))
    of_keys = grad_scores.transpose(2, 3) @ wide_query, chances.transpose(2, 3) @ wide_grad
    grad_key, grad_value = (each.unflatten(1, (-1, group)).sum(2) for each in of_keys)
    return grad_scores @ wide_key, grad_key, grad_value
