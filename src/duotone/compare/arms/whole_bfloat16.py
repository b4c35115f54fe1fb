"""A model that is BF16 throughout and keeps no masters, for the libraries that leave the casts to their users.

Floating-point inputs are cast to BF16 before `forward`, its outputs to FP32 after it, as Accelerate and Fabric do, so
that losses outside the model are computed in FP32.
"""

from typing import Any

import torch
from torch import Tensor, nn


def whole_bfloat16(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model with weights and buffers in BF16 on a device; it is changed in place.

    >>> model = whole_bfloat16(nn.Linear(2, 1), torch.device("cpu"))
    >>> model.weight.dtype, model(torch.ones(3, 2)).dtype
    (torch.bfloat16, torch.float32)
    """
    model.to(device, torch.bfloat16)
    model.register_forward_pre_hook(_narrow, with_kwargs=True)
    model.register_forward_hook(_widen)
    return model


def _narrow(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _cast((args, kwargs), torch.bfloat16)


def _widen(module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(output, torch.float32)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, dict):
        return {name: _cast(value, dtype) for name, value in values.items()}
    return type(values)(_cast(value, dtype) for value in values) if type(values) in (tuple, list) else values
