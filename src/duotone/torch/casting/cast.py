"""Puts a module into its policy: resident weights in `param`, arithmetic in `compute`, results in `output`.

Weights change their dtype in place and keep every bit: what a 16-bit weight cannot hold is its tail. They are cast
once, here, and not in every forward pass. `module_policies` resolves the policy of each module, `storage_plan` plans
how each parameter is stored, `cast_forward` is what happens in a forward pass. Running statistics and other buffers
stay as they are.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from duotone.call_site import warn
from duotone.errors import PolicyError
from duotone.policy import Policy, Rule
from duotone.torch.casting.cast_forward import CastForward, cast_forward_of, check_module, input_dtype, torch_dtype
from duotone.torch.casting.half_on_cpu import say_once_how_half_runs_on_cpu
from duotone.torch.casting.module_policies import ModulePolicy, resolve, with_implied_rules
from duotone.torch.casting.own_methods import OwnMethods, remove_forward
from duotone.torch.casting.storage_plan import (
    ApplyWhenShaped,
    apply,
    in_float32,
    is_castable,
    is_lazy,
    plan,
)
from duotone.torch.internals.training import parameters_of
from duotone.torch.kernels import SPLIT_DTYPES
from duotone.torch.parameters.foreign_averages import watch_foreign_averages
from duotone.torch.parameters.foreign_writes import PassWatch
from duotone.torch.parameters.full_precision import check_not_in_block
from duotone.torch.parameters.plain_steps import watch_plain_steps
from duotone.torch.parameters.shards import is_shard, is_sharded
from duotone.torch.parameters.storage import set_storage, storage_of

Module = TypeVar("Module", bound=nn.Module)
# a part in which one of these differs has a border of its own
_OF_BORDERS = ("param", "compute", "output", "inputs", "residual")


def cast(model: Module, policy: Policy | str) -> Module:
    """Put a model into a policy, in place.

    Floating-point parameters in FP32, BF16 or FP16 get the policy's `param` dtype, except those of norms, which stay
    FP32 unless a rule names them; FP64, integer and complex parameters, and all buffers, are left alone: an operation
    on a FP32 buffer and a 16-bit tensor gives FP32, as always in torch. Tied parameters stay tied, lazily shaped ones
    are cast when they get their shape. Frozen ones are stored as the policy's `frozen` says: by default without a tail,
    but for tables and constants; if bits are lost, it is warned of. Casting again with the same policy changes nothing;
    casting to another one starts from the FP32 masters. `uncast` undoes it.

    Args:
        model: any module.
        policy: a `Policy`, or its text: a preset such as `"bf16"`, or anything `Policy.parse` reads, rules by path and
            by type among it: `"bf16; head: output=float32; type=Embedding: grad=float32"`.

    Returns:
        The same model, for chaining.

    Raises:
        PolicyError: the policy cannot be read or is not available in torch yet, a weight is too large for FP16, a
            rule holds for no module, rules disagree on a tied parameter, or the model is sharded or wrapped for several
            ranks already. The model is unchanged then.

    >>> import torch
    >>> model = cast(nn.Linear(2, 1), "bf16")
    >>> model.weight.dtype, model(torch.ones(1, 2)).dtype
    (torch.bfloat16, torch.float32)
    """
    check_module(model, "cast")
    _check_not_parallel(model, "cast")
    policy = with_implied_rules(model, Policy.parse(policy))
    policies = resolve(model, policy)
    modules = dict(model.named_modules())
    planned = plan(modules, policies)
    if not planned and any(param.dtype == torch.float64 for param in model.parameters()):
        warn(f"no parameter of this {type(model).__name__} was cast, for they are FP64; call model.float() first")
    _remove_forwards(modules.values())
    names = {param: name for name, param in model.named_parameters()}
    apply(planned, names)
    for order, (param, name) in enumerate(names.items()):
        set_storage(param, storage_of(param).changed(loss_scale=policy.loss_scale, name=name, order=order))
    watch_plain_steps()
    watch_foreign_averages()
    for path, module in modules.items():
        forward = forward_for(module, path, policy, policies[path])
        if forward is not None:
            forward.install()
        if forward is not None or parameters_of(module):
            OwnMethods(module).install(is_root=module is model)
    _flatten_recurrent_weights(modules.values())
    computes_in_half = any(each.effective.compute == "float16" for each in policies.values())
    if computes_in_half and any(param.device.type == "cpu" for param in model.parameters()):
        say_once_how_half_runs_on_cpu()
    return model


def uncast(model: Module) -> Module:
    """Undo `cast`, in place: every weight becomes its FP32 master, every module has its own forward again.

    A model that was never cast is left as it is. Weights that were 16-bit before the cast become FP32 too.

    >>> model = nn.Linear(2, 1)
    >>> before = model.weight.detach().clone()
    >>> uncast(cast(model, "bf16")).weight.equal(before), policy_of(model)
    (True, None)
    """
    check_module(model, "uncast")
    _check_not_parallel(model, "uncast")
    for param in model.parameters():
        check_not_in_block(param, "uncast")
    if any(cast_forward_of(module) is not None for module in model.modules()):
        _remove_forwards(model.modules())
        apply({param: in_float32(param) for param in model.parameters() if is_castable(param)}, {})
        _flatten_recurrent_weights(model.modules())
    return model


def policy_of(model: nn.Module) -> Policy | None:
    """Return the policy that a model was cast to, or None if it was not.

    A wrapper around it, such as the one that `torch.compile` returns, is looked through. Where weights were made FP32
    since, by `model.float()`, the policy says so.

    >>> policy_of(cast(nn.Linear(2, 1), "bf16")).name
    'bf16'
    """
    check_module(model, "ask for its policy")
    forward = cast_forward_of(model)
    children = list(model.children())
    if forward is None and len(children) == 1:
        return policy_of(children[0])
    return None if forward is None else _as_stored(model, forward.policy)


def _as_stored(model: nn.Module, policy: Policy) -> Policy:
    """Return the policy of a model some of whose weights were made FP32 since, by `model.float()` for instance."""
    wide, narrow = [], 0
    for path, module in model.named_modules():
        kept = [p for p in module.parameters(recurse=False) if storage_of(p).param in SPLIT_DTYPES]
        if any(param.dtype == torch.float32 for param in kept):
            wide.append(path)
        narrow += any(param.dtype != torch.float32 for param in kept)
    if not wide:
        return policy
    in_float32 = (("param", "float32"),)
    if narrow == 0 and not any("param" in dict(rule.roles) for rule in policy.rules):
        everywhere = replace(policy, rules=(Rule("*", in_float32),)).for_module("")
        return replace(everywhere, rules=policy.rules)
    # weights that the model itself has cannot be named by a rule
    added = (Rule("*", in_float32),) if narrow == 0 else tuple(Rule(path, in_float32) for path in wide if path)
    return replace(policy, rules=(*policy.rules, *added))


def _check_not_parallel(model: nn.Module, verb: str) -> None:
    for path, module in model.named_modules():
        done = "wrapped in DistributedDataParallel" if isinstance(module, nn.parallel.DistributedDataParallel) else None
        if any(map(is_shard, module.parameters(recurse=False))) or is_sharded(module):
            done = "sharded"
        if type(module).__name__ == "_FabricModule":
            raise PolicyError(
                f"cannot {verb} a model that Lightning Fabric is around; {verb} the model first, then call fabric.setup"
            )
        if done is not None:
            raise PolicyError(
                f'cannot {verb} this {type(model).__name__}: module "{path}" is {done} already, and whatever reduces '
                f"gradients holds its weights as they are; {verb} the model first, then use duotone.torch.fully_shard "
                "or data_parallel"
            )


def _remove_forwards(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        remove_forward(module)


def _flatten_recurrent_weights(modules: Iterable[nn.Module]) -> None:
    # cuDNN wants the weights of a recurrent layer in one piece; elsewhere this does nothing
    for module in modules:
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


def forward_for(module: nn.Module, path: str, policy: Policy, own: ModulePolicy) -> CastForward | None:
    """Return what is to stand in front of a module's forward; None for nothing."""
    effective, outer = own.effective, own.outer
    pending = ApplyWhenShaped(path, own) if is_lazy(module) else None
    inputs = input_dtype(effective)
    if path == "":
        output = torch_dtype(effective.output)
        forward = CastForward(module, policy, effective, inputs=inputs, output=output, is_border=True, pending=pending)
        forward.passes = PassWatch()
        return forward
    if any(getattr(effective, role) != getattr(outer, role) for role in _OF_BORDERS):
        # a part returns what the module around it computes in, unless a rule says what it is to return, or it is in a
        # residual stream in FP32
        output = torch_dtype(effective.output if own.sets_output else outer.compute)
        in_stream = not own.sets_output and outer.residual == "float32" != outer.compute
        border = {"output": output, "is_border": True, "in_stream": in_stream}
        return CastForward(module, effective, effective, inputs=inputs, **border, pending=pending)
    is_container = type(module).forward is nn.Module.forward
    if is_container or (effective.compute == "float32" and pending is None):
        return None
    return CastForward(module, effective, effective, pending=pending)
