"""A module's forward in its policy: operations under their rules, and casts at the border.

The root of a cast model, and each part that a rule treats differently, is a border where outputs are cast. Inputs come
as they are, and each product rounds what it needs, unless the policy says what they are to be; what computes in FP32
has them widened.
Every module inside stands ready to enter the region of its border again, because activation checkpointing calls parts
of a model a second time, during the backward pass and outside of the border. Called by itself, such a module is its own
border. Left out: recurrent layers under torch.compile, unless `torch._dynamo.config.allow_rnn` is set.
"""

import copy
import functools
import sys
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from duotone.call_site import warn
from duotone.errors import DuotoneWarning, PolicyError
from duotone.policy import Policy
from duotone.torch.casting.region import PRODUCTS, Region, normalize
from duotone.torch.internals.autograd import in_backward, is_jit_tracing
from duotone.torch.internals.compiler import is_scripting_frame
from duotone.torch.internals.dispatch import past_modes
from duotone.torch.internals.training import active_ddp, gathering_of
from duotone.torch.kernels import SPLIT_DTYPES
from duotone.torch.nested import cast_floating, tensors_in
from duotone.torch.parameters.foreign_averages import say_if_copied_for_average
from duotone.torch.parameters.foreign_writes import PassWatch
from duotone.torch.parameters.masters import has_lost_tail
from duotone.torch.parameters.plain_steps import watch_plain_steps
from duotone.torch.parameters.shards import is_sharded
from duotone.torch.parameters.storage import set_storage, storage_of


class CastForward:
    """Stands in front of a module's forward.

    Args:
        module: the module whose forward it is.
        policy: what `policy_of` is to return for the module.
        effective: the module's policy, rules applied.
        inputs: what inputs are cast to; None to take them as they come.
        output: what the output of a border is cast to.
        is_border: whether the module is the root of a cast model, or a part that a rule treats differently.
        in_stream: whether the output is left as it comes where the inputs came in FP32, or without a dtype: then a
            residual stream in FP32 goes through the module, or starts there.
        pending: casts the parameters of a lazily shaped module at its first call, when they have a shape.

    Attributes:
        policy: the policy that the module was cast to; for a part of a model, the effective one of that part.
        effective: the module's policy, rules applied.
        passes: what counts the forward passes of the whole model; None in its parts.
    """

    _has_asked_for_ranks = False
    # of the root alone
    passes: PassWatch | None = None
    # models that earlier versions pickled have none
    _class_without_mode: type[nn.Module] | None = None

    def __init__(
        self,
        module: nn.Module,
        policy: Policy,
        effective: Policy,
        *,
        inputs: torch.dtype | None = None,
        output: torch.dtype | None = None,
        is_border: bool = False,
        in_stream: bool = False,
        pending: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.policy = policy
        self.effective = effective
        self._module = module
        self._forward = _innermost(module)
        self._inputs = inputs
        self._output = output
        self._is_border = is_border
        self._in_stream = in_stream
        self._pending = pending
        self._by_itself = input_dtype(effective), torch_dtype(effective.output)
        self._region = Region(torch_dtype(effective.compute), effective.residual)
        # as long as it is that: a parametrization of its weight makes another class of it
        self._class_without_mode = type(module) if self._region.runs_without_mode(module) else None
        # its name and its signature; whatever else it carries is its own
        functools.update_wrapper(self, self._forward, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_border and self._pending is None:
            is_plain = self._class_without_mode is type(self._module)
            if is_plain and len(args) == 1 and type(args[0]) is Tensor and self._region.is_only_mode():
                shared = self._region.shared
                # a mode takes longer to call a function than a small one takes to run
                with past_modes():
                    if type(self._module) is nn.LayerNorm:
                        return normalize(self._module, args[0])
                    if args[0].dtype is torch.float32 and shared is not None and type(self._module) in PRODUCTS:
                        args = (shared(args[0], by_autocast=True),)
                    return self._forward(*args, **kwargs)
            tracing = torch.compiler.is_compiling()
            if self._region.is_active(_device_type(self._module, args) if tracing else "cpu"):
                return self._forward(*args, **kwargs)
        if self._is_border and not torch.compiler.is_compiling() and is_jit_tracing() and torch.is_grad_enabled():
            # a trace holds no autograd functions, which Duotone's own gradients are made of
            with torch.no_grad():
                return self(*args, **kwargs)
        if self._pending is not None:
            self._pending(self._module)
            self._pending = None
        inputs, output = self._inputs, self._output
        # neither inside of a border nor run again in a backward pass: a part that is called by itself is its own border
        if not self._is_border and (torch.compiler.is_compiling() or not in_backward()):
            inputs, output = self._by_itself
        # compiling first: a graph that depends on the other is compiled again once the model ran uncompiled
        if self._is_border and not torch.compiler.is_compiling() and not self._has_asked_for_ranks:
            self._has_asked_for_ranks = _say_if_masters_differ(self._module)
        if self.passes is not None and self.passes.count(self._module) and self.policy.master is not None:
            _say_if_records_are_lost(self._module)
        output = None if self._in_stream and not _all_narrow((args, kwargs)) else output
        if inputs is not None:
            args = (cast_floating(args[0], inputs),) if len(args) == 1 else cast_floating(args, inputs)
            kwargs = cast_floating(kwargs, inputs) if kwargs else kwargs
        with self._region.on(_device_type(self._module, args)):
            try:
                result = self._forward(*args, **kwargs)
            except RuntimeError as error:
                _check_float32_weights(self._module, self.effective, error)
                raise
        return result if output is None else cast_floating(result, output)

    @property
    def __code__(self) -> Any:
        # torch.export asks where a model is from
        return self._forward.__code__

    @property
    def __globals__(self) -> Any:
        # torch.jit.script compiles a function's source
        if is_scripting_frame(sys._getframe(1)):
            raise PolicyError(
                f"a cast {type(self._module).__name__} cannot be given to torch.jit.script, which compiles the source "
                "of its forward and would lose the policy; use torch.jit.trace or torch.export, or script "
                "duotone.torch.uncast(model) for FP32"
            )
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '__globals__'")

    def of_copy(self, module: nn.Module) -> "CastForward":
        """Return what stands in front of the forward of a shallow copy of the module."""
        twin = object.__new__(CastForward)
        twin.__dict__.update(self.__dict__, _module=module, _forward=of_other(self._forward, self._module, module))
        functools.update_wrapper(twin, twin._forward, updated=())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "CastForward":
        copied = object.__new__(CastForward)
        memo[id(self)] = copied
        if self._is_border:
            say_if_copied_for_average(self._module)
        if self.passes is not None:
            self.passes.look_at_copy(self._module)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        # torch copies a parameter without its attributes; a module's parameters are copied before its forward
        for param in self._module.parameters():
            twin = memo.get(id(param))
            if isinstance(twin, Tensor):
                set_storage(twin, copy.deepcopy(storage_of(param), memo))
                if param.is_floating_point():
                    twin.grad_dtype = param.grad_dtype
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # torch pickles a parameter with its attributes, but without the dtype of its gradient
        params = self._module.parameters() if self._is_border else ()
        return {**self.__dict__, "grad_dtypes": [(p, p.grad_dtype) for p in params if p.is_floating_point()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "grad_dtypes" not in state:
            raise PolicyError(
                "this model was pickled by an earlier version of Duotone, which kept its masters in another way; save "
                "it with that version's save_checkpoint, and load that"
            )
        self.__dict__.update(state)
        # a process that loads a cast model may never cast one
        watch_plain_steps()
        for param, grad_dtype in self.__dict__.pop("grad_dtypes"):
            param.grad_dtype = grad_dtype

    def install(self) -> None:
        """Put this in front of the module's forward, but inside of what recomputes activations."""
        outer: Any = self._module.__dict__.get("forward")
        if hasattr(outer, "inner"):
            outer.inner = self
        else:
            self._module.forward = self

    def reinstall(self) -> None:
        """Put this back where `remove` took it from, in front of whatever stands there by now."""
        self._forward = _innermost(self._module)
        functools.update_wrapper(self, self._forward, updated=())
        self.install()

    def remove(self) -> None:
        """Give the module the forward back that it had."""
        outer: Any = self._module.__dict__["forward"]
        if outer is not self:
            outer.inner = self._forward
        elif getattr(self._forward, "__func__", None) is type(self._module).forward:
            del self._module.forward
        else:
            self._module.forward = self._forward


def _all_narrow(inputs: Any) -> bool:
    """Return whether there are floating-point tensors, and all in 16 bits."""
    dtypes = {tensor.dtype for tensor in tensors_in(inputs) if tensor.is_floating_point()}
    return bool(dtypes) and dtypes <= {*SPLIT_DTYPES}


def of_other(method: Callable[..., Any], module: nn.Module, other: nn.Module) -> Callable[..., Any]:
    """Return what is a method of one module as the method of another; anything else itself."""
    is_own = getattr(method, "__self__", None) is module
    return method.__func__.__get__(other) if is_own else method  # type: ignore[attr-defined]


def _say_if_masters_differ(module: nn.Module) -> bool:
    """Warn if torch's own DistributedDataParallel runs a module with masters; return whether one runs it at all."""
    around = active_ddp()
    if around is None:
        return False
    params = (param for param in module.parameters() if param.requires_grad)
    drift = any(storage.tail is not None and storage.ranks is None for storage in map(storage_of, params))
    if drift and torch.distributed.get_world_size(around.process_group) > 1:
        warnings.warn(
            "torch's DistributedDataParallel is around a cast model: it sends weights to the other ranks, but not the "
            "rest of their FP32 masters, so that ranks drift apart unless all were seeded alike, and it sums gradients "
            "in 16 bits; use duotone.torch.data_parallel(model), which takes the same arguments",
            DuotoneWarning,
            stacklevel=3,
        )
    return True


def _say_if_records_are_lost(module: nn.Module) -> None:
    """Warn if torch's own fully_shard has made new parameters of a cast model, which know nothing of their masters."""
    sharded = [part for part in module.modules() if is_sharded(part)]
    if any(has_lost_tail(each.sharded_param) for part in sharded for _, every in gathering_of(part) for each in every):
        warn(
            f"torch's fully_shard has made new parameters of this cast {type(module).__name__}, without the rest of "
            "their FP32 masters, which is lost, and small updates will be; shard a cast model with "
            "duotone.torch.fully_shard, which takes the same arguments"
        )


def _check_float32_weights(module: nn.Module, policy: Policy, error: RuntimeError) -> None:
    """Raise if a part that computes in FP32 has failed for its weights were made 16-bit since the cast.

    Raises:
        PolicyError: it has.
    """
    if policy.compute != "float32" or "type" not in str(error):
        return
    for part in module.modules():
        forward = cast_forward_of(part)
        own = part.named_parameters(recurse=False) if forward is None or forward.effective.compute == "float32" else ()
        for name, param in own:
            if param.dtype in SPLIT_DTYPES and storage_of(param).param == torch.float32:
                raise PolicyError(
                    f'the policy computes in float32 here, but "{name}" of this {type(part).__name__} is in '
                    f"{param.dtype} since the model was converted by half(), bfloat16() or the like; call float(), or "
                    "cast the model to a policy that computes in 16 bits"
                ) from error


def check_module(model: object, verb: str) -> None:
    """Raise unless `model` is a module.

    Raises:
        PolicyError: it is not.
    """
    if isinstance(model, type):
        raise PolicyError(f"got the class {model.__name__} to {verb}; give an instance of it")
    if not isinstance(model, nn.Module):
        raise PolicyError(f"got a {type(model).__name__} to {verb}; give a torch.nn.Module, before anything else")


def cast_forward_of(module: nn.Module) -> CastForward | None:
    """Return what stands in front of a module's forward, or None."""
    forward = _innermost(module)
    return forward if isinstance(forward, CastForward) else None


def _innermost(module: nn.Module) -> Callable[..., Any]:
    """Return a module's forward as it is inside of what recomputes activations."""
    return getattr(module.forward, "inner", module.forward)


def torch_dtype(format_name: str) -> torch.dtype:
    """Return torch's dtype of a format.

    >>> torch_dtype("bfloat16")
    torch.bfloat16
    """
    return getattr(torch, format_name)


def input_dtype(effective: Policy) -> torch.dtype | None:
    """Return what a border casts floating-point inputs to; None to take them as they come.

    >>> input_dtype(Policy.parse("bf16")), input_dtype(Policy.parse("fp32"))
    (None, torch.float32)
    """
    if effective.inputs is not None:
        return torch_dtype(effective.inputs)
    # no operation casts there, and FP32 weights are not multiplied by 16-bit inputs
    return torch.float32 if effective.compute == "float32" else None


def _device_type(module: nn.Module, args: tuple[Any, ...]) -> str:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
    return next(chain(module.parameters(), module.buffers(), [torch.empty(0)])).device.type
