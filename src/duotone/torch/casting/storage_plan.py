"""Plans how each parameter of a cast model is stored, and carries the plan out.

A plan is made for the whole model, and checked, before the first parameter changes. Parameters of torch's norms stay
FP32: there are few of them, kernels take them beside 16-bit data, and small updates to numbers near 1 are what 16 bits
lose first. So do parameters that start a residual stream where that is FP32: class tokens and position embeddings. A
rule that sets `param` for a module itself, by its path or its type, goes before that.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from duotone.errors import PolicyError
from duotone.torch.casting.frozen_weights import FLOAT32, as_frozen, is_broadcast, warn_of_rounding
from duotone.torch.casting.module_policies import ModulePolicy
from duotone.torch.internals.training import BATCH_NORMS
from duotone.torch.kernels import SPLIT_DTYPES, Rounding, encode
from duotone.torch.parameters.edits import record
from duotone.torch.parameters.foreign_writes import say_if_written
from duotone.torch.parameters.full_precision import check_not_in_block
from duotone.torch.parameters.masters import beyond_range, read_master
from duotone.torch.parameters.storage import Storage, set_storage, set_tail, storage_of

NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CASTABLE = (torch.float32, *SPLIT_DTYPES)


def plan(modules: Mapping[str, nn.Module], policies: Mapping[str, ModulePolicy]) -> dict[nn.Parameter, Storage]:
    """Return how every parameter that a policy concerns is to be stored. Tails are made when the plan is applied.

    Args:
        modules: all modules of a model, by path.
        policies: theirs, by path.

    Raises:
        PolicyError: rules disagree on a tied parameter, or a weight is too large for FP16.
    """
    plans: dict[nn.Parameter, tuple[str, Storage, list[nn.Module]]] = {}
    for path, module in modules.items():
        for full_name, param, storage in _planned(module, path, policies[path]):
            other_name, other, owners = plans.setdefault(param, (full_name, storage, []))
            if other != storage:
                both = (other, storage)
                kept = [str(each.param) for each in both]
                if other.frozen != storage.frozen:
                    kept = [f"{each.param}, frozen={each.frozen}" for each in both]
                raise PolicyError(
                    f'"{other_name}" and "{full_name}" are one tied parameter, but it would be kept in {kept[0]} '
                    f"and {kept[1]}; write a rule that covers both"
                )
            owners.append(module)
    planned = {}
    for param, (full_name, storage, owners) in plans.items():
        planned[param] = as_frozen(param, owners, storage)
        _check_range(full_name, param, planned[param])
    return planned


def in_float32(param: nn.Parameter) -> Storage:
    """Return how a parameter is stored as an FP32 weight."""
    return storage_of(param).changed(**FLOAT32, loss_scale=None)


def apply(planned: Mapping[nn.Parameter, Storage], names: Mapping[nn.Parameter, str]) -> None:
    """Store parameters as planned, in place; warn, once, if frozen ones lost bits."""
    say_if_written(planned)
    stored, rounded = [], []
    for param, storage in planned.items():
        is_stored_anew, is_rounded = _store(param, storage)
        if is_stored_anew:
            stored.append(param)
        if is_rounded:
            rounded.append(param)
    record(*stored)
    if rounded:
        warn_of_rounding([names[param] for param in rounded], sum(param.numel() for param in rounded))


def _store(param: nn.Parameter, storage: Storage) -> tuple[bool, bool]:
    """Store a parameter as planned; its FP32 master stays what it is, bit for bit, if it has one.

    Returns:
        Whether its weight or its tail is another tensor now; whether it is to have no tail, and lost bits by that.
    """
    assert storage.param is not None
    before = storage_of(param)
    tail = before.tail
    # one that was frozen since keeps the tail that it has
    is_kept = storage.frozen == "tail" or (tail is not None and before.frozen != "tail")
    is_split = storage.param in SPLIT_DTYPES and storage.rounding is None
    has_tail = is_split and (param.requires_grad or is_kept)
    grad, param.grad = param.grad, None
    is_stored_anew = param.dtype != storage.param or has_tail != (tail is not None)
    is_rounded = False
    if is_stored_anew:
        weight, tail = _master(param), None
        if storage.param in SPLIT_DTYPES:
            weight, tail = encode(weight, storage.param)
            is_rounded = is_split and not (has_tail or param.is_meta) and bool(tail.any())
        param.data = weight
    param.grad_dtype = storage.grad
    param.grad = None if grad is None else grad.to(storage.grad)
    if is_stored_anew:
        set_tail(param, tail if has_tail else None, storage)
    else:
        set_storage(param, storage)
    return is_stored_anew, is_rounded


def _master(param: nn.Parameter) -> Tensor:
    """Return a parameter's FP32 master, in its own memory if it is one."""
    return param.detach() if param.dtype == torch.float32 else read_master(param)


def set_grad_dtype(param: nn.Parameter, dtype: torch.dtype) -> None:
    """Have a parameter's gradient accumulate in a dtype; the one that it has becomes one of that dtype."""
    grad, param.grad = param.grad, None
    param.grad_dtype = dtype
    param.grad = None if grad is None else grad.to(dtype)


@dataclass(frozen=True)
class ApplyWhenShaped:
    """Stores the parameters of a lazily shaped module as planned once they have a shape."""

    path: str
    own: ModulePolicy

    def __call__(self, module: nn.Module) -> None:
        planned, names = {}, {}
        for full_name, param, storage in _planned(module, self.path, self.own):
            planned[param], names[param] = as_frozen(param, [module], storage), full_name
            _check_range(full_name, param, planned[param])
        apply(planned, names)


def is_lazy(module: nn.Module) -> bool:
    """Return whether a module has parameters without a shape."""
    return any(isinstance(param, UninitializedParameter) for param in module.parameters(recurse=False))


def is_castable(param: nn.Parameter) -> bool:
    """Return whether a policy concerns a parameter: one in FP32, BF16 or FP16 that has a shape."""
    return param.dtype in _CASTABLE and not isinstance(param, UninitializedParameter)


def planned_fields(module: nn.Module, own: ModulePolicy, param: nn.Parameter | None = None) -> dict[str, Any]:
    """Return what a module's policy says about the records of its own parameters, or of one of them, by field."""
    policy = own.effective
    dtypes = {role: getattr(torch, getattr(policy, role)) for role in ("param", "grad", "reduce", "state")}
    starts_stream = param is not None and policy.residual == "float32" and is_broadcast(module, param)
    if (starts_stream or isinstance(module, NORMS)) and not own.sets_param:
        return {**FLOAT32, "reduce": dtypes["reduce"], "state": dtypes["state"], "frozen": policy.frozen}
    has_no_master = policy.param != "float32" and policy.master is None
    return {**dtypes, "rounding": Rounding(policy.rounding) if has_no_master else None, "frozen": policy.frozen}


def _planned(module: nn.Module, path: str, own: ModulePolicy) -> Iterator[tuple[str, nn.Parameter, Storage]]:
    planned = planned_fields(module, own)
    for name, param in module.named_parameters(recurse=False):
        if is_castable(param):
            storage = storage_of(param)
            if storage.in_full_precision:
                check_not_in_block(param, "cast")
            # most parameters are as their module says
            fields = planned_fields(module, own, param) if param.ndim > 1 and param.shape[0] == 1 else planned
            fields = {**fields, **FLOAT32} if name in own.kept else fields
            yield f"{path}.{name}" if path else name, param, storage.changed(**fields)


def _check_range(name: str, param: nn.Parameter, storage: Storage) -> None:
    # the one format that is asked about; a master is a copy
    largest = beyond_range(_master(param), storage.param) if storage.param == torch.float16 else None
    if largest is not None:
        raise PolicyError(
            f'parameter "{name}" holds {largest:.6g}, beyond FP16\'s largest 65504; use policy "bf16", or keep '
            "its module in FP32 by a rule: param=float32,compute=float32"
        )
