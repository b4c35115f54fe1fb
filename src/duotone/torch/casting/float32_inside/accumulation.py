"""What adds terms to the elements of a tensor one by one, summed in FP32 and rounded once.

torch adds every term of `index_put` and `put` to a 16-bit element, and so do `index_reduce_` and sparse tensors with
several values in one place: in BF16 a sum of ones stalls at 256. The forms in place sum in FP32 too, and write the
rounded sums. Left out: calls that do not accumulate, which are copies, and not called here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from duotone.torch.casting.widened import widen_and_round, widen_to_data

_NARROW = (torch.bfloat16, torch.float16)


def accumulates(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of `index_put` or `put` adds to what is there.

    >>> x, at = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    >>> accumulates((x, at, x, True), {}), accumulates((x, at, x), {})
    (True, False)
    """
    return bool(args[3] if len(args) > 3 else kwargs.get("accumulate", False))


def accumulate_in_float32(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call `index_put` or `put`, summed in FP32.

    Args:
        func: the function, method or operator.
        args: its arguments: the tensor, where, what, and whether to accumulate.
        kwargs: its named arguments.

    >>> x, at = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.int64)
    >>> accumulate_in_float32(torch.put, (x, at, torch.ones(1000).bfloat16()), {"accumulate": True})
    tensor([1000.], dtype=torch.bfloat16)
    """
    return widen_and_round(func, args, kwargs)


def accumulate_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call `index_put_`, `put_` or `index_reduce_`, summed in FP32 and rounded to what is written into.

    Args:
        func: the method or operator.
        args: its arguments: the tensor, where, what, and whether to accumulate.
        kwargs: its named arguments.

    >>> x, at = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.int64)
    >>> accumulate_in_place(torch.Tensor.put_, (x, at, torch.ones(1000)), {"accumulate": True})
    tensor([1000.], dtype=torch.bfloat16)
    """
    target = args[0]
    if target.dtype not in _NARROW:
        return func(target, *(arg.float() if _is_narrow(arg) else arg for arg in args[1:]), **kwargs)
    # the function of that name that makes a tensor; an operator's name has its overload behind a point
    apart = getattr(torch, func.__name__.partition(".")[0].removesuffix("_"))
    # a copy may be kept for the backward pass, and what is written into may not
    kept = target.clone() if torch.is_grad_enabled() else target
    return target.copy_(widen_to_data(apart, (kept, *args[1:]), kwargs))


def add_duplicates_in_float32(func: Callable[..., Any], source: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call `coalesce` or `to_dense`, which add values in one place up, summed in FP32.

    Args:
        func: the method; its arguments follow: the tensor comes first, and is left as it is if it is dense.

    >>> ones = torch.ones(1000, dtype=torch.bfloat16)
    >>> x = torch.sparse_coo_tensor(torch.zeros(1, 1000, dtype=torch.int64), ones, (1,))
    >>> add_duplicates_in_float32(torch.Tensor.to_dense, x)
    tensor([1000.], dtype=torch.bfloat16)
    """
    if source.layout is not torch.sparse_coo or source.is_coalesced():
        return func(source, *args, **kwargs)
    return widen_to_data(func, (source, *args), kwargs)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _NARROW
