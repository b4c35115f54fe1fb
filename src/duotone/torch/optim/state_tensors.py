"""The tensors in a parameter's state, however an optimizer nests them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from duotone.torch.nested import tensors_in
from duotone.torch.parameters.shards import cut, is_shard


def copy_state(value: Any, device: torch.device | None = None, param: Tensor | None = None) -> Any:
    """Return a deep copy of a state; no dtype changes.

    Args:
        value: tensors, nested in dicts, lists and tuples, among anything else.
        device: where tensors go; None for where they are.
        param: the parameter whose state it is: tensors of its shape are laid out as it is, as fused kernels need them,
            and cut as it is.

    >>> copy_state({"step": 3, "moments": [torch.ones(1, dtype=torch.int8)]})
    {'step': 3, 'moments': [tensor([1], dtype=torch.int8)]}
    """

    def copied(tensor: Tensor) -> Tensor:
        goal = device or tensor.device
        if param is None or tensor.shape != param.shape:
            return tensor.detach().clone().to(goal)
        if is_shard(param):
            return cut(tensor.detach().clone().to(goal), param)
        return torch.empty_like(param, dtype=tensor.dtype, device=goal, requires_grad=False).copy_(tensor.detach())

    return _copied(copied, value)


def in_float32(value: Any, *dtypes: torch.dtype) -> Any:
    """Return a state with its tensors of some dtypes in FP32.

    >>> in_float32([torch.ones(1, dtype=torch.bfloat16), torch.tensor(1)], torch.bfloat16)
    [tensor([1.]), tensor(1)]
    """
    return _copied(lambda tensor: tensor.float() if tensor.dtype in dtypes else tensor, value)


def _copied(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    # a deep copy takes from its memo what stands in place of an object
    return copy.deepcopy(value, {id(tensor): change(tensor) for tensor in tensors_in(value)})
