"""`x[index]` of 16-bit tensors with gradients summed in FP32: `grad[v] = round16(sum over what came from v)`.

torch adds up the gradient of indexing with integer tensors in the dtype of `x`, so that in BF16 an element indexed
1,000 times gets 256. Here an index is split: what gives a view (numbers, slices, `None`, `...`) is left to torch, and
what gathers from that view has a gradient of its own, FP32 until it is rounded once. A call without an integer tensor
or a list of integers in its index goes to torch as it is. Left out: NumPy arrays and nested lists as indices, and
forward-mode derivatives.
"""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from duotone.torch.casting.float32_inside.autograd_function import apply
from duotone.torch.casting.float32_inside.gathers import GatherRows, needs_sum

_MASKS = (torch.bool, torch.uint8)
# what most calls index with, and what has no sum
_SIMPLE = (int, slice, type(None), type(Ellipsis), bool)


def getitem_in_float32(func: Callable[..., Any], source: Tensor, index: Any) -> Any:
    """Index a tensor; where an integer tensor or a list of integers does it, with a gradient summed in FP32.

    Args:
        func: `Tensor.__getitem__`; its arguments follow.

    >>> x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    >>> getitem_in_float32(torch.Tensor.__getitem__, x, torch.zeros(1000, dtype=torch.int64)).sum().backward()
    >>> x.grad.tolist()
    [1000.0, 0.0]
    """
    index_type = type(index)
    if index_type in _SIMPLE or not needs_sum(source):
        return func(source, index)
    indices = index if index_type is tuple else (index,)
    for item in indices:
        if type(item) not in _SIMPLE:
            break
    else:
        return func(source, index)
    split = _split(source, indices)
    if split is None:
        return func(source, index)
    basic, advanced = split
    view = func(source, basic)
    if len(advanced) == 1:
        ((dim, positions),) = advanced.items()
        return apply(GatherRows, view, dim, positions, False)
    # torch.compile refuses the same tensor twice
    positions = [index.view_as(index) if dim else index for dim, index in enumerate(advanced.values())]
    return apply(_Points, view, tuple(advanced), *positions)


def index_in_float32(func: Callable[..., Any], source: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Call `torch.ops.aten.index` with a gradient summed in FP32.

    Args:
        func: the operator; its arguments follow: a dimension that is not indexed has None in its place.

    >>> x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    >>> index_in_float32(torch.ops.aten.index, x, [torch.zeros(1000, dtype=torch.int64)]).sum().backward()
    >>> x.grad.tolist()
    [1000.0, 0.0]
    """
    if not needs_sum(source):
        return func(source, indices)
    whole = tuple(slice(None) if index is None else index for index in indices)
    return getitem_in_float32(Tensor.__getitem__, source, whole)


class _Points(Function):
    """Elements, by one index for each of several dimensions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(source: Tensor, dims: tuple[int, ...], *indices: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        positions = dict(zip(dims, indices, strict=True))
        return source[tuple(positions.get(dim, slice(None)) for dim in range(dims[-1] + 1))]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        source, ctx.dims, *indices = inputs
        ctx.shape = source.shape
        ctx.save_for_backward(*indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        positions = dict(zip(ctx.dims, ctx.saved_tensors, strict=True))
        indices = [positions.get(dim) for dim in range(ctx.dims[-1] + 1)]
        zeros = grad.new_zeros(ctx.shape, dtype=torch.float32)
        return torch.ops.aten.index_put.default(zeros, indices, grad.float(), True), None, *(None for _ in ctx.dims)


def _split(source: Tensor, indices: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[int, Tensor]] | None:
    """Split an index into one that gives a view and, for dimensions of that view, the tensors that gather from it.

    Returns None where no integer tensor is among them, or something that torch alone understands.
    """
    tensors = [_as_tensor(item, source) for item in indices]
    if not any(tensor is not None and tensor.dim() > 0 and tensor.dtype not in _MASKS for tensor in tensors):
        return None
    taken = sum(1 if item is None else item.dim() if item.dtype in _MASKS else 1 for item in tensors)
    taken -= sum(item is None or item is Ellipsis for item in indices)
    basic: list[Any] = []
    advanced: dict[int, Tensor] = {}
    dim, ellipses = 0, 0
    for item, tensor in zip(indices, tensors, strict=True):
        if tensor is not None and (tensor.dim() > 0 or tensor.dtype in _MASKS):
            for positions in tensor.nonzero(as_tuple=True) if tensor.dtype in _MASKS else (tensor,):
                basic.append(slice(None))
                advanced[dim] = positions
                dim += 1
        elif item is None or isinstance(item, slice):
            basic.append(item)
            dim += 1
        elif item is Ellipsis:
            basic.append(item)
            dim += source.dim() - taken
            ellipses += 1
        elif not isinstance(item, bool) and (tensor is not None or isinstance(item, (Integral, torch.SymInt))):
            # a number takes its dimension away
            basic.append(item)
        else:
            return None
    return (tuple(basic), advanced) if ellipses < 2 else None


def _as_tensor(item: Any, source: Tensor) -> Tensor | None:
    if isinstance(item, Tensor):
        return item.to(source.device)
    if type(item) is list and item and all(type(number) is int for number in item):
        return torch.tensor(item, device=source.device)
    return None
