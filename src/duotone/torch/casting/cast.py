"""Puts a module into its policy: resident weights in `param`, arithmetic in `compute`, results in `output`.

Weights change their dtype in place and keep every bit: what a 16-bit weight cannot hold waits on it as its tail. They
are cast once, here, and not in every forward pass. How each is stored is planned in `storage_plan`, what happens in a
forward pass stands in `cast_forward`. Running statistics and other buffers stay as they are.
"""

import warnings
from dataclasses import replace
from difflib import get_close_matches
from typing import TypeVar

import torch
from torch import nn

from duotone.errors import DuotoneWarning, PolicyError
from duotone.policy import ClassNames, Policy, Rule
from duotone.torch.casting.cast_forward import CastForward, cast_forward_of, check_module, torch_dtype
from duotone.torch.casting.half_on_cpu import say_once_how_half_runs_on_cpu
from duotone.torch.casting.keep_float32 import is_kept_in_float32
from duotone.torch.casting.storage_plan import ApplyWhenShaped, apply, in_float32, is_castable, is_lazy, plan
from duotone.torch.parameters.shards import is_shard, is_sharded
from duotone.torch.parameters.storage import set_storage, storage_of

Module = TypeVar("Module", bound=nn.Module)


def cast(model: Module, policy: Policy | str) -> Module:
    """Put a model into a policy, in place.

    Floating-point parameters in FP32, BF16 or FP16 get the policy's `param` dtype, except those of norms, which stay
    FP32 unless a rule names them; FP64, integer and complex parameters, and all buffers, are left alone: an operation
    on a FP32 buffer and a 16-bit tensor gives FP32, as always in torch. Tied parameters stay tied, frozen ones get no
    tail, lazily shaped ones are cast when they get their shape. Casting again with the same policy changes nothing;
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
    classes = _class_names(model)
    policy = _with_marks(model, Policy.parse(policy))
    _check(model, policy, classes)
    planned = plan(model, policy, classes)
    if not planned and any(param.dtype == torch.float64 for param in model.parameters()):
        warnings.warn(
            f"no parameter of this {type(model).__name__} was cast, for they are FP64; call model.float() first",
            DuotoneWarning,
            stacklevel=2,
        )
    _remove_forwards(model)
    for param, storage in planned.items():
        apply(param, storage)
    for order, (name, param) in enumerate(model.named_parameters()):
        set_storage(param, replace(storage_of(param), name=name, order=order))
    for path, module in model.named_modules():
        forward = _forward_for(module, path, policy, classes)
        if forward is not None:
            forward.install()
    _flatten_recurrent_weights(model)
    if "float16" in _compute_formats(policy) and any(param.device.type == "cpu" for param in model.parameters()):
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
    if any(cast_forward_of(module) is not None for module in model.modules()):
        _remove_forwards(model)
        for param in model.parameters():
            if is_castable(param):
                apply(param, in_float32(param))
        _flatten_recurrent_weights(model)
    return model


def policy_of(model: nn.Module) -> Policy | None:
    """Return the policy that a model was cast to, or None if it was not.

    A wrapper around it, such as the one that `torch.compile` returns, is looked through.

    >>> policy_of(cast(nn.Linear(2, 1), "bf16")).name
    'bf16'
    """
    check_module(model, "ask for its policy")
    forward = cast_forward_of(model)
    children = list(model.children())
    if forward is None and len(children) == 1:
        return policy_of(children[0])
    return None if forward is None else forward.policy


def _check_not_parallel(model: nn.Module, verb: str) -> None:
    for path, module in model.named_modules():
        done = "wrapped in DistributedDataParallel" if isinstance(module, nn.parallel.DistributedDataParallel) else None
        if any(map(is_shard, module.parameters(recurse=False))) or is_sharded(module):
            done = "sharded"
        if done is not None:
            raise PolicyError(
                f'cannot {verb} this {type(model).__name__}: module "{path}" is {done} already, and whatever reduces '
                f"gradients holds its weights as they are; {verb} the model first, then use duotone.torch.fully_shard "
                "or data_parallel"
            )


def _class_names(model: nn.Module) -> ClassNames:
    return {
        path: tuple(kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module))
        for path, module in model.named_modules()
    }


def _with_marks(model: nn.Module, policy: Policy) -> Policy:
    """Add a rule for every module that `keep_float32` has marked."""
    marked = [path for path, module in model.named_modules() if is_kept_in_float32(module)]
    if not marked or policy.param == policy.compute == "float32":
        return policy
    if "" in marked:
        raise PolicyError(f'keep_float32 marks all of this {type(model).__name__}; cast it to policy "fp32"')
    roles = (("param", "float32"), ("compute", "float32"), ("output", "float32"))
    kept = tuple(Rule(path, roles) for path in marked)
    return replace(policy, rules=policy.rules + tuple(rule for rule in kept if rule not in policy.rules))


def _check(model: nn.Module, policy: Policy, classes: ClassNames) -> None:
    name = type(model).__name__
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise PolicyError(
                f'module "{path}" of this {name} is TorchScript, whose forward cannot be put into a policy; cast the '
                "model before torch.jit.script"
            )
    for rule in policy.rules:
        if not any(rule.matches(path, classes) for path in classes):
            what_there_is = _what_there_is(rule.pattern, classes)
            raise PolicyError(f'rule "{rule}" holds for no module of this {name}, {what_there_is}')
    for path in classes:
        compute = policy.for_module(path, classes).compute
        if compute.startswith("float8"):
            raise PolicyError(f"compute={compute} is not available in torch yet; use bfloat16 or float16")


def _what_there_is(pattern: str, classes: ClassNames) -> str:
    """Return the end of a sentence about a pattern that matches nothing."""
    of_types = dict.fromkeys(name for names in classes.values() for name in names[:1])
    wanted = pattern.removeprefix("type=").rpartition(".")[2]
    if pattern != f"type={wanted}" and wanted in of_types:
        return f"but {wanted} is a class there; write type={wanted}"
    kind, known = ("classes", list(of_types)) if pattern.startswith("type=") else ("modules", [p for p in classes if p])
    near = get_close_matches(wanted if kind == "classes" else pattern, known, n=3, cutoff=0.5)
    if near:
        return f"whose {kind} include {' and '.join(near)}; mend its pattern"
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return f"whose {kind} are {', '.join(known[:5]) or 'itself alone'}{more}; mend its pattern"


def _remove_forwards(model: nn.Module) -> None:
    for module in model.modules():
        forward = cast_forward_of(module)
        if forward is not None:
            forward.remove()


def _flatten_recurrent_weights(model: nn.Module) -> None:
    # cuDNN wants the weights of a recurrent layer in one piece; elsewhere this does nothing
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


def _compute_formats(policy: Policy) -> set[str | None]:
    return {policy.compute, *(dict(rule.roles).get("compute") for rule in policy.rules)}


def _forward_for(module: nn.Module, path: str, policy: Policy, classes: ClassNames) -> CastForward | None:
    effective = policy.for_module(path, classes)
    around = policy.for_module(path.rpartition(".")[0], classes)
    pending = ApplyWhenShaped(path, policy, classes) if is_lazy(module) else None
    # with FP32 weights each operation casts what it needs, as in torch.amp; inputs come as they are
    inputs = torch_dtype(effective.compute) if effective.param == effective.compute else None
    if path == "":
        output = torch_dtype(effective.output)
        return CastForward(module, policy, effective, inputs=inputs, output=output, pending=pending)
    if any(getattr(effective, role) != getattr(around, role) for role in ("param", "compute", "output")):
        # a part returns what its surroundings compute in, unless a rule says what it is to return
        says = any(rule.holds_for(path, classes) and "output" in dict(rule.roles) for rule in policy.rules)
        output = torch_dtype(effective.output if says else around.compute)
        return CastForward(module, effective, effective, inputs=inputs, output=output, pending=pending)
    is_container = type(module).forward is nn.Module.forward
    if is_container or (effective.compute == "float32" and pending is None):
        return None
    return CastForward(module, effective, effective, pending=pending)
