"""Private names of torch's tensors: their memory, what they wrap, and structures that hold them."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from duotone.torch.internals.lookup import find, find_or_refuse

# tells storages apart that are alive; without it, their addresses do
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/StorageMethods.cpp
_cdata: Any = find("torch:UntypedStorage._cdata")
storage_id: Callable[[UntypedStorage], int] = UntypedStorage.data_ptr if _cdata is None else _cdata.__get__
# the same of those that may be gone; without it, explain counts memory that is used again once
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/multiprocessing/reductions.py#L22
storage_reference: Callable[[UntypedStorage], Hashable] = find(
    "torch.multiprocessing.reductions:StorageWeakRef", UntypedStorage.data_ptr
)
# what a sparse tensor stands on; without them, torch refuses one that is not coalesced
# https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml
sparse_indices: Callable[[Tensor], Tensor] = find("torch:Tensor._indices", Tensor.indices)
sparse_values: Callable[[Tensor], Tensor] = find("torch:Tensor._values", Tensor.values)
# has two tensors exchange their memory, dtype, gradient and hooks, and stay the objects that they are; without it,
# gradients of weights that full_precision has widened do not reach the hooks of DistributedDataParallel any more
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/Module.cpp
_swap: Callable[[Tensor, Tensor], None] | None = find("torch._C:_swap_tensor_impl")
# what a DTensor is besides
_OF_DTENSOR = ("_local_tensor", "_spec")
# this rank's part of a DTensor; without it, what its `to_local` returns
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/tensor/_api.py
LOCAL_TENSOR = "_local_tensor"

# tells of thousands of tensors in one call whether they are like others; without it, each is asked for what it is like
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/dynamo/guards.cpp
_guards: Any = find("torch._C:_dynamo.guards.TensorGuards")


def likeness_of(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a function that tells whether other tensors are like these, but for where they lie and their values.

    It takes as many tensors, one argument for each, and compares type, dtype, device, shape, strides, and whether they
    are sparse or only noted as negated. It may tell tensors apart that are alike for every purpose here, no others.

    >>> holds = likeness_of([torch.zeros(2, 3)])
    >>> holds(torch.ones(2, 3)), holds(torch.ones(3, 2)), holds(torch.ones(3, 2).t())
    (True, False, False)
    """
    if _guards is not None:
        return _guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    expected = _likes(tensors)
    return lambda *others: _likes(others) == expected


def _likes(tensors: Sequence[Tensor]) -> list[Any]:
    return [
        (type(each), each.dtype, each.device, each.layout, each.shape, each.is_neg(), _strides(each))
        for each in tensors
    ]


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.stride() if tensor.layout is torch.strided else None


def local_part(tensor: Any) -> Tensor:
    """Return this rank's part of a DTensor, sharing its memory."""
    part = getattr(tensor, LOCAL_TENSOR, None)
    if part is None:
        with torch.no_grad():
            part = tensor.to_local()
    return part


def exchange(first: Any, second: Any) -> None:
    """Have two parameters exchange memory, dtype, shape, gradient and hooks; each keeps its identity and attributes."""
    try:
        if _swap is None:
            raise RuntimeError
        _swap(first, second)
    except RuntimeError:
        # somebody in C++ refers to one of them weakly, or torch has no such function
        _exchange_data(first, second)
    if all(hasattr(first, name) for name in _OF_DTENSOR):
        for name in _OF_DTENSOR:
            of_first, of_second = getattr(first, name), getattr(second, name)
            setattr(first, name, of_second)
            setattr(second, name, of_first)


def _exchange_data(first: Any, second: Any) -> None:
    grads = first.grad, second.grad
    first.grad = second.grad = None
    first.data, second.data = second.data, first.data
    first.grad_dtype, second.grad_dtype = second.grad_dtype, first.grad_dtype
    second.grad, first.grad = grads


def wrapped_in(tensor: Any) -> list[Any] | None:
    """Return the tensors that a tensor wraps, such as the parts of a quantized one; None if it wraps none."""
    # what torch.utils._python_dispatch.is_traceable_wrapper_subclass asks for
    # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/_python_dispatch.py
    if type(tensor) is Tensor or not (
        hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "__tensor_unflatten__")
    ):
        return None
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


# takes structures apart and puts them together as torch does itself, those that other libraries have registered too
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/_pytree.py
_TREES = "which checkpoint_activations and explain need to find the tensors that a module is given"
tree_flatten: Callable[[Any], tuple[list[Any], Any]] = find_or_refuse("torch.utils._pytree:tree_flatten", _TREES)
tree_unflatten: Callable[[Iterable[Any], Any], Any] = find_or_refuse("torch.utils._pytree:tree_unflatten", _TREES)
tree_leaves: Callable[[Any], list[Any]] = find("torch.utils._pytree:tree_leaves", lambda tree: tree_flatten(tree)[0])
