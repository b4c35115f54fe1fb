"""How each parameter of a cast model is kept: its dtype, its gradient's, its tail or rounding, its moments' dtype.

A plan is made for the whole model, and checked, before the first parameter changes. Parameters of torch's norms stay
FP32: there are few of them, kernels take them beside 16-bit data, and small updates to numbers near 1 are what 16 bits
lose first. A rule that sets `param` for a norm itself, by its path or its type, goes before that.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter

from duotone.errors import PolicyError
from duotone.policy import ClassNames, Policy
from duotone.torch.kernels import SPLIT_DTYPES, Rounding, encode
from duotone.torch.parameters.masters import (
    beyond_range,
    read_master,
    set_reduce_dtype,
    set_state_dtype,
    set_storage,
    tail_of,
)

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CASTABLE = (torch.float32, *SPLIT_DTYPES)


@dataclass(frozen=True)
class Residence:
    """How one parameter is to be kept.

    Attributes:
        param: the dtype of the resident weight.
        grad: the dtype that its gradient accumulates in.
        rounding: how updates are stored if there is no master, else None.
        state: the dtype of the optimizer's moments.
        reduce: the dtype that ranks reduce its gradient in.
    """

    param: torch.dtype = torch.float32
    grad: torch.dtype = torch.float32
    rounding: Rounding | None = None
    state: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32


def plan(model: nn.Module, policy: Policy, classes: ClassNames) -> dict[nn.Parameter, Residence]:
    """Return how every parameter that a policy concerns is to be kept.

    Raises:
        PolicyError: rules disagree on a tied parameter, or a weight is too large for FP16.
    """
    plans: dict[nn.Parameter, tuple[str, Residence]] = {}
    for path, module in model.named_modules():
        for full_name, param, residence in _residences(module, path, policy, classes):
            other_name, other = plans.setdefault(param, (full_name, residence))
            if other != residence:
                raise PolicyError(
                    f'"{other_name}" and "{full_name}" are one tied parameter, but it would be kept in {other.param} '
                    f"and {residence.param}; write a rule that covers both"
                )
            _check_range(full_name, param, residence)
    return {param: residence for param, (_, residence) in plans.items()}


def settle(param: nn.Parameter, residence: Residence) -> None:
    """Bring a parameter into its residence, in place; its FP32 master stays what it is, bit for bit."""
    tail = tail_of(param)
    # one that was frozen since keeps the tail that it has
    is_split = residence.param in SPLIT_DTYPES and residence.rounding is None
    has_tail = is_split and (param.requires_grad or tail is not None)
    grad, param.grad = param.grad, None
    if param.dtype != residence.param or has_tail != (tail is not None):
        weight, tail = read_master(param), None
        if residence.param in SPLIT_DTYPES:
            weight, tail = encode(weight, residence.param)
        param.data = weight
    param.grad_dtype = residence.grad
    param.grad = None if grad is None else grad.to(residence.grad)
    set_storage(param, tail if has_tail else None, residence.rounding)
    set_state_dtype(param, residence.state)
    set_reduce_dtype(param, residence.reduce)


@dataclass(frozen=True)
class SettleWhenShaped:
    """Brings the parameters of a lazily shaped module into their residence once they have a shape."""

    path: str
    policy: Policy
    classes: ClassNames

    def __call__(self, module: nn.Module) -> None:
        for full_name, param, residence in _residences(module, self.path, self.policy, self.classes):
            _check_range(full_name, param, residence)
            settle(param, residence)


def is_lazy(module: nn.Module) -> bool:
    """Return whether a module has parameters without a shape."""
    return any(isinstance(param, UninitializedParameter) for param in module.parameters(recurse=False))


def is_castable(param: nn.Parameter) -> bool:
    """Return whether a policy concerns a parameter: one in FP32, BF16 or FP16 that has a shape."""
    return param.dtype in _CASTABLE and not isinstance(param, UninitializedParameter)


def _residences(
    module: nn.Module, path: str, policy: Policy, classes: ClassNames
) -> Iterator[tuple[str, nn.Parameter, Residence]]:
    residence = _residence_in(module, path, policy, classes)
    for name, param in module.named_parameters(recurse=False):
        if is_castable(param):
            yield f"{path}.{name}" if path else name, param, residence


def _residence_in(module: nn.Module, path: str, policy: Policy, classes: ClassNames) -> Residence:
    effective = policy.for_module(path, classes)
    state, reduce = getattr(torch, effective.state), getattr(torch, effective.reduce)
    says_param = any(rule.matches(path, classes) and "param" in dict(rule.roles) for rule in policy.rules)
    if isinstance(module, NORMS) and not says_param:
        return Residence(state=state, reduce=reduce)
    rounding = None
    if effective.param != "float32" and effective.master is None:
        rounding = Rounding(effective.rounding)
    return Residence(getattr(torch, effective.param), getattr(torch, effective.grad), rounding, state, reduce)


def _check_range(name: str, param: nn.Parameter, residence: Residence) -> None:
    largest = beyond_range(read_master(param), residence.param)
    if largest is not None:
        raise PolicyError(
            f'parameter "{name}" holds {largest:.6g}, beyond FP16\'s largest 65504; use policy "bf16", or keep '
            "its module in FP32 by a rule: param=float32,compute=float32"
        )
