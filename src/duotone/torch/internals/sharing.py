"""Private counts of torch that tell whether anybody else can reach a tensor's memory, which then may be written over.

They are compared with those of a tensor that is known to be held by one saved reference of autograd's and one variable:
what Python itself counts is not the same in all of its versions.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from duotone.torch.internals.lookup import find

# how many hold a tensor and its memory in C++; without either, no memory is taken to be a tensor's alone
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/python_variable.cpp
_use_count: Callable[[Tensor], int] | None = find("torch:Tensor._use_count")
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/Storage.cpp
_storage_use_count: Callable[[int], int] | None = find("torch._C:_storage_Use_Count")
# whether the backward pass that is running keeps what it was saved for a second one; without it, each does
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/init.cpp
_keeps_graph: Callable[[], bool] = find("torch._C._autograd:_get_current_graph_task_keep_graph", lambda: True)

_alone: dict[bool, tuple[int, ...]] = {}


def may_write_over(tensor: Tensor) -> bool:
    """Return whether what a backward pass has saved is of no use to anybody after it.

    Args:
        tensor: taken from `ctx.saved_tensors`, held by one variable of the caller; dense, in the order of its shape.

    >>> may_write_over(torch.ones(2))
    False
    """
    if _use_count is None or _storage_use_count is None or _keeps_graph() or not tensor.is_contiguous():
        return False
    is_view = tensor._base is not None
    if is_view not in _alone:
        counts = _counts_alone(is_view)
        # hooks on saved tensors keep another one
        if counts[:2] != (2, 3 if is_view else 2):
            return False
        _alone[is_view] = counts
    return _counts(tensor) == _alone[is_view]


def _counts_alone(is_view: bool) -> tuple[int, ...]:
    """Return the counts of a tensor that is saved once, and that one variable of this function holds."""
    with torch.enable_grad():
        made = torch.ones(1, 1, requires_grad=True, device="cpu") * 1
        tensor = made.view(-1) if is_view else made
        del made
        # the function after it holds it
        _after = tensor.sin()
    return _at_the_same_depth(tensor)


def _at_the_same_depth(tensor: Tensor) -> tuple[int, ...]:
    return _counts(tensor)


def _counts(tensor: Any) -> tuple[int, ...]:
    assert _use_count is not None
    assert _storage_use_count is not None
    memory, base = tensor.untyped_storage(), tensor._base
    counts = _use_count(tensor), _storage_use_count(memory._cdata), sys.getrefcount(memory), sys.getrefcount(tensor)
    return counts if base is None else (*counts, _use_count(base), sys.getrefcount(base))
