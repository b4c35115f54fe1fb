"""One memory layout for all tensors of an operand, so that a kernel sees nothing but runs of elements.

A weight that lies dense in memory, in whatever order of its dimensions, is updated where it is, and what belongs to
it must lie likewise. Anything else (a strided slice, a gradient in another order) is copied before the update, and
copied back after it if it was written.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from duotone.torch.kernels.operands import AverageOperand, Batch, Operand


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor whose elements fill one run of memory: itself if it does, else a contiguous copy.

    >>> image = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    >>> dense(image) is image, dense(torch.zeros(9)[::2]).stride()
    (True, (1,))
    """
    return tensor if _is_dense(tensor) else tensor.contiguous()


def in_one_layout(operands: Sequence[Operand]) -> tuple[Sequence[Operand], list[Callable[[], object]]]:
    """Return operands whose tensors are dense and in their weight's order, and what to call after the update.

    Args:
        operands: any; those that are in one layout already are returned as they are.
    """
    if isinstance(operands, Batch) or all(map(is_contiguous, operands)):
        return operands, []
    write_back: list[Callable[[], object]] = []
    return [_in_layout_of_weight(operand, write_back) for operand in operands], write_back


def is_contiguous(operand: Operand) -> bool:
    """Return whether all tensors of an operand are contiguous, which is one layout."""
    weight, tail, grad, moments, *_ = operand
    return (
        weight.is_contiguous()
        and grad.is_contiguous()
        and (tail is None or tail.is_contiguous())
        and all(map(Tensor.is_contiguous, moments))
        # what only notes that it is negated has the wrong sign in memory
        and not grad.is_neg()
    )


def is_in_one_layout(operand: AverageOperand) -> bool:
    """Return whether the tensors of an average are dense, and in one order of their elements."""
    weight, tail, average = operand
    strides = _strides(weight)
    return _is_dense(weight) and all(_strides(tensor) == strides for tensor in (tail, average) if tensor is not None)


def _in_layout_of_weight(operand: Operand, write_back: list[Callable[[], object]]) -> Operand:
    strides = _strides(dense(operand.weight))

    def in_layout(tensor: Tensor, *, written: bool = True) -> Tensor:
        if _strides(tensor) == strides and not tensor.is_neg():
            return tensor
        copied = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        if written:
            write_back.append(lambda: tensor.copy_(copied))
        return copied

    return operand._replace(
        weight=in_layout(operand.weight.detach()),
        tail=None if operand.tail is None else in_layout(operand.tail),
        grad=in_layout(operand.grad.detach(), written=False),
        moments=tuple(in_layout(moment) for moment in operand.moments),
    )


def _is_dense(tensor: Tensor) -> bool:
    # torch keeps the strides of just those tensors that are dense and do not overlap
    return tensor.is_contiguous() or _strides(torch.empty_like(tensor, device="meta")) == _strides(tensor)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's strides; those of dimensions of size 1, which mean nothing, as 1."""
    if tensor.numel() == 0:
        return (1,) * tensor.dim()
    return tuple([1 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
