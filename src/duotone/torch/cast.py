"""Puts a module into its policy: resident weights in `param`, arithmetic in `compute`, results in `output`.

Weights change their dtype in place and keep every bit: what a 16-bit weight cannot hold waits on it as its tail. They
are cast once, here, and not in every forward pass. What happens in a forward pass stands in `cast_forward`. Running
statistics and other buffers stay as they are.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter

from duotone.errors import PolicyError
from duotone.policy import Policy
from duotone.torch.cast_forward import CastForward, cast_forward_of, torch_dtype
from duotone.torch.half_on_cpu import say_once_how_half_runs_on_cpu
from duotone.torch.kernels import SPLIT_DTYPES, Rounding, encode
from duotone.torch.master import beyond_range, read_master, set_state_dtype, set_storage, tail_of

Module = TypeVar("Module", bound=nn.Module)

_CASTABLE = (torch.float32, *SPLIT_DTYPES)


@dataclass(frozen=True)
class _Residence:
    """How one parameter is to be kept."""

    param: torch.dtype
    grad: torch.dtype
    rounding: Rounding | None
    state: torch.dtype


def cast(model: Module, policy: Policy | str) -> Module:
    """Put a model into a policy, in place.

    Floating-point parameters in FP32, BF16 or FP16 get the policy's `param` dtype, except those of norms that keep
    running statistics, which stay FP32; FP64, integer and complex parameters, and all buffers, are left alone.
    Tied parameters stay tied, frozen ones get no tail. Casting again with the same policy changes nothing; casting
    to another one starts from the FP32 masters.

    Args:
        model: any module, its lazily shaped parameters initialised.
        policy: a `Policy`, or its text: a preset such as `"bf16"`, or anything `Policy.parse` reads.

    Returns:
        The same model, for chaining.

    Raises:
        PolicyError: the policy cannot be read or is not available in torch yet, a weight is too large for FP16, a
            rule holds for no module, or rules disagree on a tied parameter. The model is unchanged then.

    >>> model = cast(nn.Linear(2, 1), "bf16")
    >>> model.weight.dtype, model(torch.ones(1, 2)).dtype
    (torch.bfloat16, torch.float32)
    """
    policy = Policy.parse(policy)
    residences = _plan(model, policy)
    for module in model.modules():
        forward = cast_forward_of(module)
        if forward is not None:
            forward.remove()
    for param, residence in residences:
        _settle(param, residence)
    for path, module in model.named_modules():
        forward = _forward_for(module, path, policy)
        if forward is not None:
            module.forward = forward  # type: ignore[method-assign]
    if "float16" in _compute_formats(policy) and any(param.device.type == "cpu" for param in model.parameters()):
        say_once_how_half_runs_on_cpu()
    return model


def policy_of(model: nn.Module) -> Policy | None:
    """Return the policy that a model was cast to, or None if it was not.

    A wrapper around it, such as the one that `torch.compile` returns, is looked through.

    >>> policy_of(cast(nn.Linear(2, 1), "bf16")).name
    'bf16'
    """
    forward = cast_forward_of(model)
    children = list(model.children())
    if forward is None and len(children) == 1:
        return policy_of(children[0])
    return None if forward is None else forward.policy


def _plan(model: nn.Module, policy: Policy) -> list[tuple[nn.Parameter, _Residence]]:
    paths = [path for path, _ in model.named_modules()]
    for rule in policy.rules:
        if not any(rule.holds_for(path) for path in paths):
            raise PolicyError(
                f'rule "{rule}" holds for no module of this {type(model).__name__}, whose modules are '
                f"{', '.join(paths[1:6]) or 'itself alone'}{', ...' if len(paths) > 6 else ''}; mend its pattern"
            )
    plans: dict[nn.Parameter, tuple[str, _Residence]] = {}
    for path, module in model.named_modules():
        effective = policy.for_module(path)
        _check_available(effective)
        for name, param in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}" if path else name
            if isinstance(param, UninitializedParameter):
                raise PolicyError(f'parameter "{full_name}" has no shape yet; run one batch, then cast')
            if param.dtype not in _CASTABLE:
                continue
            residence = _residence(module, param, effective)
            other_name, other = plans.setdefault(param, (full_name, residence))
            if other != residence:
                raise PolicyError(
                    f'"{other_name}" and "{full_name}" are one tied parameter, but the rules keep it in {other.param} '
                    f"and {residence.param}; write a rule that covers both"
                )
            _check_range(full_name, param, residence)
    return [(param, residence) for param, (_, residence) in plans.items()]


def _compute_formats(policy: Policy) -> set[str | None]:
    return {policy.compute, *(dict(rule.roles).get("compute") for rule in policy.rules)}


def _residence(module: nn.Module, param: nn.Parameter, policy: Policy) -> _Residence:
    state = torch_dtype(policy.state)
    if isinstance(module, _NormBase):
        return _Residence(torch.float32, torch.float32, None, state)
    rounding = None
    if policy.param != "float32" and policy.master is None:
        rounding = Rounding(policy.rounding)
    return _Residence(torch_dtype(policy.param), torch_dtype(policy.grad), rounding, state)


def _check_available(policy: Policy) -> None:
    if policy.compute.startswith("float8"):
        raise PolicyError(f"compute={policy.compute} is not available in torch yet; use bfloat16 or float16")


def _check_range(name: str, param: nn.Parameter, residence: _Residence) -> None:
    largest = beyond_range(read_master(param), residence.param)
    if largest is not None:
        raise PolicyError(
            f'parameter "{name}" holds {largest:.6g}, beyond FP16\'s largest 65504; use policy "bf16", or keep '
            "its module in FP32 by a rule: param=float32,compute=float32"
        )


def _settle(param: nn.Parameter, residence: _Residence) -> None:
    tail = tail_of(param)
    has_tail = residence.param in SPLIT_DTYPES and residence.rounding is None and param.requires_grad
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


def _forward_for(module: nn.Module, path: str, policy: Policy) -> CastForward | None:
    effective = policy.for_module(path)
    around = policy.for_module(path.rpartition(".")[0])
    # with FP32 weights each operation casts what it needs, as in torch.amp; inputs come as they are
    inputs = torch_dtype(effective.compute) if effective.param == effective.compute else None
    if path == "":
        return CastForward(module, policy, inputs=inputs, output=torch_dtype(effective.output))
    if any(getattr(effective, role) != getattr(around, role) for role in ("param", "compute", "output")):
        # a part returns what its surroundings compute in, unless a rule says what it is to return
        says = any(rule.holds_for(path) and "output" in dict(rule.roles) for rule in policy.rules)
        output = effective.output if says else around.compute
        return CastForward(module, effective, inputs=inputs, output=torch_dtype(output))
    is_container = type(module).forward is nn.Module.forward
    if is_container or effective.compute == "float32":
        return None
    return CastForward(module, effective)
