"""Tensors inside nested structures: what a model takes and returns.

Tuples, named tuples, lists, dicts and dataclasses are walked; anything else is left as it is.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)
# torch 2.11's compiler cannot read the `__dict__` of an object that the graph made: attributes besides fields are lost
_READS_DICT_IN_GRAPHS = TorchVersion(torch.__version__) >= "2.13"


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `change` to every tensor in `value` and return the structure with the results.

    A container in which no tensor changed is returned itself, not a copy.

    >>> map_tensors(torch.neg, {"x": (torch.tensor(1), "text")})
    {'x': (tensor(-1), 'text')}
    """
    return _map(change, value)[0]


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a nested structure, in order.

    >>> [tensor.item() for tensor in tensors_in({"a": torch.tensor(1), "b": (torch.tensor(2), "text")})]
    [1, 2]
    """
    tensors: list[Tensor] = []

    def append(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(append, value)
    return tensors


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """Cast the FP32, BF16 and FP16 tensors in `value` to `dtype`; integer, complex and FP64 tensors stay.

    >>> x, i = cast_floating((torch.ones(1), torch.tensor([1])), torch.bfloat16)
    >>> x.dtype, i.dtype
    (torch.bfloat16, torch.int64)
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in _FLOATING else value
    # a tensor that occurs twice is cast once, and stays one
    done: dict[Tensor, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        if tensor.dtype not in _FLOATING or tensor.dtype == dtype:
            return tensor
        # by the tensor and not by its id(), which breaks a graph of torch 2.11's compiler
        if tensor not in done:
            done[tensor] = tensor.to(dtype)
        return done[tensor]

    return map_tensors(change, value)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> tuple[Any, bool]:
    """Return what `value` becomes, and whether it changed: torch 2.11's compiler does not compare lists by `is`."""
    if isinstance(value, Tensor):
        new = change(value)
        return new, new is not value
    # dataclasses.is_dataclass asks hasattr of a class, which torch 2.11's compiler cannot trace
    if getattr(type(value), "__dataclass_fields__", None) is not None:
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        items, changed = _map_all(change, [getattr(value, name) for name in names])
        return (_fill_dataclass(value, names, items) if changed else value), changed
    if isinstance(value, (tuple, list)):
        items, changed = _map_all(change, value)
        if not changed:
            return value, False
        return (type(value)(*items) if hasattr(value, "_fields") else type(value)(items)), True
    if isinstance(value, dict):
        items, changed = _map_all(change, value.values())
        return (_fill_dict(value, items) if changed else value), changed
    return value, False


def _map_all(change: Callable[[Tensor], Tensor], values: Iterable[Any]) -> tuple[list[Any], bool]:
    items, any_changed = [], False
    for value in values:
        item, changed = _map(change, value)
        items.append(item)
        any_changed = any_changed or changed
    return items, any_changed


def _fill_dict(old: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    # a shallow copy keeps the subclass and what it carries, a default factory for instance
    copied = old.copy()
    for key, item in zip(old, items, strict=True):
        copied[key] = item
    return copied


def _fill_dataclass(old: Any, names: list[str], items: list[Any]) -> Any:
    # neither its constructor nor what it computes from its fields is run again; a frozen one is filled in all the same
    copied = _shallow_copy(old)
    for name, item in zip(names, items, strict=True):
        object.__setattr__(copied, name, item)
        # what the transformers library returns is a dict as well, which has the same items
        if isinstance(copied, dict) and name in copied:
            dict.__setitem__(copied, name, item)
    return copied


def _shallow_copy(old: Any) -> Any:
    if not torch.compiler.is_compiling():
        return copy.copy(old)
    # in steps that every compiler of torch can trace, slots included; the caller fills the fields in
    copied = type(old).__new__(type(old))  # pyright: ignore[reportCallIssue]
    for name, item in getattr(old, "__dict__", {}).items() if _READS_DICT_IN_GRAPHS else ():
        object.__setattr__(copied, name, item)
    if isinstance(old, dict):
        for key, item in old.items():
            dict.__setitem__(copied, key, item)
    return copied
