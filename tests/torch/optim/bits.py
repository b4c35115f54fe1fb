"""What an optimizer holds, as plain values that `==` compares bit by bit, so that -0 is not 0 and a NaN is itself."""

from typing import Any

import torch
from torch import Tensor

from duotone.torch.parameters.masters import read_master


def bits_of(value: Any) -> Any:
    """Return a deep copy of nested tensors, memory layout apart."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().contiguous().flatten().view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: bits_of(item) for key, item in value.items()}
    return [bits_of(item) for item in value] if isinstance(value, list | tuple) else value


def everything_of(optimizer: torch.optim.Optimizer) -> Any:
    """Return weights, masters and state."""
    weights = [param for group in optimizer.param_groups for param in group["params"]]
    return bits_of([weights, [read_master(weight) for weight in weights], optimizer.state_dict()])
