"""Which torch optimizers `MasterWeights` can wrap, and why not the others."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch.optim.base import MasterOptimizer, check_parameters
from duotone.torch.parameters.storage import storage_of

_SHARED = ("param_groups", "state", "defaults")


def check_wrappable(optimizer: torch.optim.Optimizer) -> None:
    """Raise unless `MasterWeights` can wrap an optimizer.

    Raises:
        OptimizerError: it cannot, or a parameter is neither FP32, BF16 nor FP16.

    >>> check_wrappable(torch.optim.LBFGS([torch.ones(1, requires_grad=True)]))
    Traceback (most recent call last):
    ...
    duotone.errors.OptimizerError: LBFGS cannot be wrapped in MasterWeights: ...
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(f"MasterWeights wraps a torch.optim.Optimizer, but this is a {name}; build one first")
    if isinstance(optimizer, MasterOptimizer):
        raise OptimizerError(f"{name} keeps FP32 masters already; use it as it is")
    reason = _reason_against(optimizer)
    if reason is not None:
        raise OptimizerError(f"{name} cannot be wrapped in MasterWeights: {reason}")
    check_parameters(param for group in optimizer.param_groups for param in group["params"])


def check_moments(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    """Raise unless the policy of every parameter leaves moments in FP32, as a wrapped optimizer keeps them.

    Raises:
        OptimizerError: one asks for another dtype.
    """
    for param in params:
        dtype = storage_of(param).state
        if dtype != torch.float32:
            raise OptimizerError(
                f"the policy keeps moments in {dtype}, but {type(optimizer).__name__} in MasterWeights keeps them in "
                "float32; use a policy with state=float32, or duotone.torch.AdamW, SGD or Lion"
            )


def _reason_against(optimizer: torch.optim.Optimizer) -> str | None:
    if isinstance(optimizer, torch.optim.LBFGS):
        return (
            "its step evaluates the model many times and moves the weights in between, from flat copies of its own; "
            "keep the weights in FP32 for it, by a policy such as fp32 or bf16-mixed"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        return "it takes sparse gradients only; use torch.optim.Adam and Embedding(sparse=False)"
    params = {id(param) for group in optimizer.param_groups for param in group["params"]}
    lists = {id(group["params"]) for group in optimizer.param_groups}
    groups = {id(group) for group in optimizer.param_groups}

    def reaches(value: Any) -> bool:
        if isinstance(value, Tensor):
            return id(value) in params
        if isinstance(value, torch.optim.Optimizer):
            return any(id(group) not in groups for group in value.param_groups)
        if isinstance(value, Mapping):
            return id(value) not in groups and any(reaches(part) for item in value.items() for part in item)
        if isinstance(value, list | tuple | set):
            return id(value) not in lists and any(reaches(item) for item in value)
        return False

    for attribute, value in vars(optimizer).items():
        if attribute not in _SHARED and reaches(value):
            return (
                f"it holds weights in its attribute {attribute}, outside of its parameter groups, and would update the "
                "16-bit ones there; keep the weights in FP32 for it, by a policy such as fp32 or bf16-mixed"
            )
    return None
