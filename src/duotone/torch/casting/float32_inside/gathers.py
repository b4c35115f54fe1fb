"""Gathering from 16-bit tensors with gradients summed in FP32: `grad[v] = round16(sum over what came from v)`.

torch adds up the gradients of `index_select`, `gather`, `take_along_dim` and `take` in the dtype of the tensor, on CPUs
as with other devices' atomic additions, so that in BF16 an element gathered 1,000 times gets 256. Results are exact
anyway. Gradients are FP32 until they are rounded once. Left out: `out=`, `sparse_grad=True`, and forward-mode
derivatives; `x[index]` is in `indexing`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from duotone.torch.casting.float32_inside.autograd_function import apply
from duotone.torch.casting.float32_inside.row_sums import grad_dtype_of, sum_rows
from duotone.torch.internals.autograd import is_batched

_NARROW = (torch.bfloat16, torch.float16)


def needs_sum(source: Tensor) -> bool:
    """Return whether a gather from `source` may have a gradient in 16 bits to sum."""
    if source.dtype not in _NARROW or not torch.is_grad_enabled():
        return False
    # a tensor inside vmap does not say whether the one that it stands for requires a gradient
    return source.requires_grad or (not torch.compiler.is_compiling() and is_batched(source))


class GatherRows(Function):
    """Slices of one dimension, by an index of any shape; with `keep` as `index_select` does it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(source: Tensor, dim: int, index: Tensor, keep: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return source.index_select(dim, index) if keep else source[(slice(None),) * dim + (index,)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        source, ctx.dim, index, _ = inputs
        ctx.shape, ctx.dtype = source.shape, grad_dtype_of(source)
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        index = ctx.saved_tensors[0].reshape(-1)
        index = torch.where(index < 0, index + ctx.shape[ctx.dim], index)
        rows = grad.float().reshape(ctx.shape[: ctx.dim] + index.shape + ctx.shape[ctx.dim + 1 :])
        return sum_rows(index, rows, ctx.shape, ctx.dim, ctx.dtype), None, None, None


class _Along(Function):
    """Elements along one dimension of a tensor that is broadcast to `shape`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(source: Tensor, shape: tuple[int, ...], dim: int, index: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return source.expand(shape).gather(dim, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        source, ctx.broadcast, ctx.dim, index = inputs
        ctx.shape = source.shape
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (index,) = ctx.saved_tensors
        zeros = grad.new_zeros(ctx.broadcast, dtype=torch.float32)
        return zeros.scatter_add_(ctx.dim, index, grad.float()).sum_to_size(ctx.shape), None, None, None


def index_select_in_float32(
    func: Callable[..., Any], input: Tensor, dim: int, index: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Call `index_select` with a gradient summed in FP32.

    Args:
        func: `torch.index_select` or the method; its arguments follow.

    >>> x = torch.ones(1, 2, dtype=torch.float16, requires_grad=True)
    >>> index_select_in_float32(torch.index_select, x, 1, torch.ones(4000, dtype=torch.int64)).sum().backward()
    >>> x.grad.tolist()
    [[0.0, 4000.0]]
    """
    if out is not None:
        return func(input, dim, index, out=out)
    if not needs_sum(input) or not _has(input, dim):
        return func(input, dim, index)
    return apply(GatherRows, input, dim % input.dim(), index, True)


def gather_in_float32(
    func: Callable[..., Any],
    input: Tensor,
    dim: int,
    index: Tensor,
    *,
    sparse_grad: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Call `gather` with a gradient summed in FP32.

    Args:
        func: `torch.gather` or the method; its arguments follow.

    >>> x = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    >>> gather_in_float32(torch.gather, x, 1, torch.ones(1, 1000, dtype=torch.int64)).sum().backward()
    >>> x.grad.tolist()
    [[0.0, 1000.0]]
    """
    if out is not None:
        return func(input, dim, index, sparse_grad=sparse_grad, out=out)
    if sparse_grad or not needs_sum(input):
        return func(input, dim, index, sparse_grad=sparse_grad)
    return apply(_Along, input, tuple(input.shape), dim, index)


def take_along_dim_in_float32(
    func: Callable[..., Any], input: Tensor, indices: Tensor, dim: int | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Call `take_along_dim` with a gradient summed in FP32, over what was broadcast too.

    Args:
        func: `torch.take_along_dim` or the method; its arguments follow.

    >>> x = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    >>> index = torch.zeros(1000, 1, dtype=torch.int64)
    >>> take_along_dim_in_float32(torch.take_along_dim, x, index, 1).sum().backward()
    >>> x.grad.tolist()
    [[1000.0, 0.0]]
    """
    if out is not None:
        return func(input, indices, dim, out=out)
    if not needs_sum(input) or indices.dtype != torch.int64:
        return func(input, indices, dim)
    if dim is None:
        return apply(_Along, input.reshape(-1), (input.numel(),), 0, indices.reshape(-1))
    if not _has(input, dim) or input.dim() != indices.dim():
        return func(input, indices, dim)
    dim %= input.dim()
    # all but the indexed dimension are broadcast
    one = torch.broadcast_shapes(_without(input.shape, dim), _without(indices.shape, dim))
    shape, index_shape = ((*one[:dim], size.shape[dim], *one[dim + 1 :]) for size in (input, indices))
    return apply(_Along, input, shape, dim, indices.expand(index_shape))


def take_in_float32(func: Callable[..., Any], input: Tensor, index: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Call `take` with a gradient summed in FP32.

    Args:
        func: `torch.take` or the method; its arguments follow.

    >>> x = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    >>> take_in_float32(torch.take, x, torch.full((1000,), -1)).sum().backward()
    >>> x.grad.tolist()
    [[0.0, 1000.0]]
    """
    if out is not None:
        return func(input, index, out=out)
    if not needs_sum(input) or index.dtype != torch.int64:
        return func(input, index)
    return apply(GatherRows, input.reshape(-1), 0, index, False)


def _has(source: Tensor, dim: int) -> bool:
    return -source.dim() <= dim < source.dim()


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return (*shape[:dim], 1, *shape[dim + 1 :])
