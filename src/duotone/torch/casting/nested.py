"""Tensors inside nested structures: what a model takes and returns.

Tuples, named tuples, lists, dicts and dataclasses are walked; anything else is left as it is.
"""

import copy
import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `change` to every tensor in `value` and return the structure with the results.

    A container in which no tensor changed is returned itself, not a copy.

    >>> map_tensors(torch.neg, {"x": (torch.tensor(1), "text")})
    {'x': (tensor(-1), 'text')}
    """
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        old = {name: getattr(value, name) for name in names}
        new = {name: map_tensors(change, item) for name, item in old.items()}
        return value if _same(old.values(), new.values()) else _rebuild_dataclass(value, new)
    if isinstance(value, (tuple, list)):
        new = [map_tensors(change, item) for item in value]
        if _same(value, new):
            return value
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if isinstance(value, dict):
        new = {key: map_tensors(change, item) for key, item in value.items()}
        return value if _same(value.values(), new.values()) else _rebuild_dict(value, new)
    return value


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """Cast the FP32, BF16 and FP16 tensors in `value` to `dtype`; integer, complex and FP64 tensors stay.

    >>> x, i = cast_floating((torch.ones(1), torch.tensor([1])), torch.bfloat16)
    >>> x.dtype, i.dtype
    (torch.bfloat16, torch.int64)
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in _FLOATING else value
    # a tensor that occurs twice is cast once, and stays one
    done: dict[int, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        if tensor.dtype not in _FLOATING or tensor.dtype == dtype:
            return tensor
        if id(tensor) not in done:
            done[id(tensor)] = tensor.to(dtype)
        return done[id(tensor)]

    return map_tensors(change, value)


def _same(old: Any, new: Any) -> bool:
    return all(map(operator.is_, old, new))


def _rebuild_dict(old: dict[Any, Any], new: dict[Any, Any]) -> dict[Any, Any]:
    # a shallow copy keeps the subclass and what it carries, a default factory for instance
    copied = old.copy()
    for key, item in new.items():
        copied[key] = item
    return copied


def _rebuild_dataclass(old: Any, new: dict[str, Any]) -> Any:
    # neither its constructor nor what it computes from its fields is run again; a frozen one is filled in all the same
    copied = copy.copy(old)
    for name, item in new.items():
        object.__setattr__(copied, name, item)
        # what the transformers library returns is a dict as well, which has the same items
        if isinstance(copied, dict) and name in copied:
            dict.__setitem__(copied, name, item)
    return copied
