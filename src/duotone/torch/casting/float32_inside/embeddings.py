"""Embeddings of 16-bit tables whose gradients are summed in FP32: `grad[v] = round16(sum of the rows' gradients)`.

In BF16 a running sum of ones stalls at 256, so that on a CPU (torch 2.13) the gradient of a row that 1,000 tokens use
comes out four times too small. Nothing of the table is widened: a lookup copies 16-bit rows, a bag sums FP32 copies of
the rows that it holds and rounds once; where a residual stream is to start in FP32, the rows looked up are widened, and
a bag's sum is not rounded. The gradient is FP32 until it is rounded once to the table's dtype, or not at all where its
`grad_dtype` says so. Left out: tables that are renormalized in place (`max_norm`) or get sparse gradients, which stay
with torch, and forward-mode derivatives.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from duotone.torch.casting.float32_inside.autograd_function import apply
from duotone.torch.casting.float32_inside.row_sums import grad_dtype_of, sum_rows

_NARROW = (torch.bfloat16, torch.float16)


class _Lookup(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool, dtype: torch.dtype
    ) -> Tensor:
        rows = torch.embedding(weight, indices)
        # torch 2.11's compiler loses the gradient of a function that ends in a cast to the dtype that is there
        return rows if rows.dtype == dtype else rows.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, indices, ctx.padding_idx, ctx.scale_grad_by_freq, _ = inputs
        ctx.shape, ctx.dtype = weight.shape, grad_dtype_of(weight)
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (indices,) = ctx.saved_tensors
        if not ctx.scale_grad_by_freq:
            indices, rows = indices.reshape(-1), grad.float().reshape(-1, ctx.shape[1])
            if ctx.padding_idx >= 0:
                rows = rows.masked_fill((indices == ctx.padding_idx).unsqueeze(1), 0)
            return sum_rows(indices, rows, ctx.shape, 0, ctx.dtype), None, None, None, None
        grad_weight = torch.ops.aten.embedding_dense_backward.default(
            grad.float(), indices, ctx.shape[0], ctx.padding_idx, True
        )
        return grad_weight, None, None, None, None


def embedding_in_float32(
    func: Callable[..., Any],
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Call `F.embedding` with a gradient summed in FP32.

    Args:
        func: `F.embedding`; its arguments follow.

    Returns:
        The rows, in the table's dtype.

    >>> from torch.nn import functional as F
    >>> weight = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    >>> rows = embedding_in_float32(F.embedding, torch.zeros(1000, dtype=torch.int64), weight)
    >>> rows.sum().backward()
    >>> rows.dtype, weight.grad.item()
    (torch.bfloat16, 1000.0)
    """
    row = _padding_row(weight, padding_idx)
    if weight.dtype not in _NARROW or not torch.is_grad_enabled() or max_norm is not None or sparse or row is None:
        return func(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return apply(_Lookup, weight, input, row, scale_grad_by_freq, weight.dtype)


def embedding_to_float32(
    func: Callable[..., Any],
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Call `F.embedding` where a residual stream in FP32 starts: as `embedding_in_float32`, its rows widened.

    >>> from torch.nn import functional as F
    >>> embedding_to_float32(F.embedding, torch.tensor([0]), torch.ones(1, 1).bfloat16()).dtype
    torch.float32
    """
    row = _padding_row(weight, padding_idx)
    is_plain = max_norm is None and not sparse and row is not None
    if weight.dtype in _NARROW and weight.is_cpu and torch.is_grad_enabled() and is_plain:
        return apply(_Lookup, weight, input, row, scale_grad_by_freq, torch.float32)
    rows = func(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return rows.float() if rows.dtype in _NARROW else rows


def torch_embedding_in_float32(
    func: Callable[..., Any],
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Call `torch.embedding`, or the operator, with a gradient summed in FP32.

    Args:
        func: the function; its arguments follow: the table comes first, and a row is not counted from the end.

    Returns:
        The rows, in the table's dtype.
    """
    if weight.dtype not in _NARROW or not torch.is_grad_enabled() or sparse:
        return func(weight, indices, padding_idx, scale_grad_by_freq, sparse)
    return apply(_Lookup, weight, indices, padding_idx, scale_grad_by_freq, weight.dtype)


def aten_embedding_to_float32(
    func: Callable[..., Any],
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Call `torch.embedding` as `embedding_to_float32`; its table comes first.

    >>> aten_embedding_to_float32(torch.embedding, torch.ones(1, 1).bfloat16(), torch.tensor([0])).dtype
    torch.float32
    """
    if weight.dtype in _NARROW and weight.is_cpu and torch.is_grad_enabled() and not sparse:
        return apply(_Lookup, weight, indices, padding_idx, scale_grad_by_freq, torch.float32)
    rows = func(weight, indices, padding_idx, scale_grad_by_freq, sparse)
    return rows.float() if rows.dtype in _NARROW else rows


def embedding_bag_in_float32(
    func: Callable[..., Any], input: Tensor, weight: Tensor, *args: Any, **named: Any
) -> Tensor:
    """Call `F.embedding_bag` with FP32 inside, its result rounded once.

    Args:
        func: `F.embedding_bag`; its arguments follow. `per_sample_weights` may have another dtype than the table.

    Returns:
        One row for each bag, in the table's dtype.

    >>> from torch.nn import functional as F
    >>> table, weights = torch.ones(3, 2, dtype=torch.bfloat16), torch.full((1, 2), 0.75)
    >>> bags = torch.tensor([[0, 2]])
    >>> embedding_bag_in_float32(F.embedding_bag, bags, table, mode="sum", per_sample_weights=weights)
    tensor([[1.5000, 1.5000]], dtype=torch.bfloat16)
    """
    return _sum_in_float32(func, input, weight, *args, **named).to(weight.dtype)


def embedding_bag_to_float32(
    func: Callable[..., Any], input: Tensor, weight: Tensor, *args: Any, **named: Any
) -> Tensor:
    """Call `F.embedding_bag` where a residual stream in FP32 starts: as `embedding_bag_in_float32`, not rounded.

    >>> from torch.nn import functional as F
    >>> embedding_bag_to_float32(F.embedding_bag, torch.tensor([[0, 0]]), torch.ones(1, 1).bfloat16()).dtype
    torch.float32
    """
    summed = _sum_in_float32(func, input, weight, *args, **named)
    return summed.float() if summed.dtype in _NARROW else summed


def _sum_in_float32(
    func: Callable[..., Any],
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Return the sums of bags in FP32, or in the table's dtype where they stay with torch."""
    row = _padding_row(weight, padding_idx)
    one_dtype = per_sample_weights is None or per_sample_weights.dtype == weight.dtype
    # CUDA has no kernel for the gradient of BF16 weights of samples (torch 2.14, EmbeddingBag.cu)
    learns = per_sample_weights is not None and per_sample_weights.requires_grad and torch.is_grad_enabled()
    has_kernels = one_dtype and not (learns and weight.dtype == torch.bfloat16)
    # other devices' kernels sum in FP32 themselves, but for the gradient of largest values
    by_itself = not weight.is_cpu and mode != "max" and has_kernels
    # frequencies of largest values are refused by torch
    refused = mode == "max" and scale_grad_by_freq
    if weight.dtype not in _NARROW or max_norm is not None or sparse or by_itself or refused or row is None:
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.to(weight.dtype)
        rest = (scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding_idx)
        return func(input, weight, offsets, max_norm, norm_type, *rest)

    # a bag sums a table of its own rows, each of which stands in it once
    indices = input.reshape(-1)
    positions = torch.arange(len(indices), dtype=input.dtype, device=input.device)
    if padding_idx is not None:
        # rows that do not count become the last row of that table, which is its padding
        positions, padding_idx = torch.where(indices == row, len(indices), positions), len(indices)
        indices = torch.cat([indices, indices.new_full((1,), row)])
    rows = apply(_Lookup, weight, indices, row, scale_grad_by_freq, torch.float32)
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.float()
    rest = (False, mode, False, per_sample_weights, include_last_offset, padding_idx)
    return func(positions.view_as(input), rows, offsets, None, norm_type, *rest)


def _padding_row(weight: Tensor, padding_idx: int | None) -> int | None:
    """Return the row of `padding_idx`, -1 without one, or None where torch is to refuse it."""
    if padding_idx is None:
        return -1
    rows = weight.shape[0]
    return padding_idx % rows if -rows <= padding_idx < rows else None
