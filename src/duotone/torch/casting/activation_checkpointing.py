"""Activation checkpointing by pattern: chosen modules keep their inputs alone and run again in the backward pass.

Training deep nets with sublinear memory cost (Chen et al., arXiv:1604.06174), on `torch.utils.checkpoint`, its variant
without reentrant autograd. The second run finds what the first one found: autocast and random numbers, which torch
sees to, and function modes, parameters and buffers, which this module does. It leaves out: keeping the results of
single operations (torch's `create_selective_checkpoint_contexts`), buffers that a forward both changes and computes
with, and copies to the CPU that overlap with computation.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from duotone.errors import DuotoneWarning, PolicyError
from duotone.torch.internals.autograd import version_of
from duotone.torch.internals.compiler import mark_constant
from duotone.torch.internals.dispatch import function_modes
from duotone.torch.internals.tensors import tree_flatten, tree_unflatten
from duotone.torch.internals.training import buffers_of, parameters_of

Module = TypeVar("Module", bound=nn.Module)


def checkpoint_activations(model: Module, *patterns: str, offload: bool = False) -> Module:
    """Let modules keep only their inputs, and compute the rest again in the backward pass; in place.

    Gradients stay the same to the bit. Without gradients (`torch.no_grad`) nothing is kept, and modules run as they
    are. Goes with `cast`, before it or after it. A later call replaces the choice of an earlier one.

    Args:
        model: any module, cast or not.
        patterns: patterns as `fnmatch` reads them, over the dotted paths of the modules inside the model; `*` matches
            dots too. A module inside a chosen one is not chosen again. None at all: no module is checkpointed any more.
        offload: keep the inputs that need a gradient in the memory of the CPU, pinned where there is CUDA, until the
            backward pass. Others, such as masks, stay where they are: modules mostly share them. Compiled code cannot
            do it and says so.

    Returns:
        The same model, for chaining.

    Raises:
        PolicyError: a pattern matches no module, or only a list of modules, which has no forward; or `offload` is asked
            for without a pattern. The model is unchanged then.

    >>> model = nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.GELU(), nn.Linear(4, 1)))
    >>> model = checkpoint_activations(model, "1*")
    >>> [path for path, module in model.named_modules() if "forward" in vars(module)]
    ['1']
    """
    chosen = _choose(model, patterns)
    if offload and not patterns:
        raise PolicyError('offload=True is for checkpointed modules; give their paths too, such as "blocks.*"')
    for module in model.modules():
        forward = checkpointed_forward_of(module)
        if forward is not None:
            forward.remove()
    for module in chosen:
        module.forward = CheckpointedForward(module, offload=offload)  # type: ignore[method-assign]
    return model


class CheckpointedForward:
    """Stands in front of a module's forward, outside of whatever else stands there.

    Args:
        module: the module whose forward it is.
        offload: whether inputs that need a gradient wait in the memory of the CPU.

    Attributes:
        inner: the callable that it runs: the module's own forward, or a `CastForward` in front of it.
    """

    def __init__(self, module: nn.Module, *, offload: bool = False) -> None:
        self._module = module
        self._offload = offload
        self.inner = module.forward

    @property
    def inner(self) -> Callable[..., Any]:
        return self._inner

    @inner.setter
    def inner(self, inner: Callable[..., Any]) -> None:
        self._inner = inner
        # the attributes of a forward that is an object are its own
        functools.update_wrapper(self, inner, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._inner(*args, **kwargs)
        if torch.compiler.is_compiling():
            if self._offload:
                _say_that_compiled_code_does_not_offload()
            return self._mark_for_compiler(args, kwargs)
        call = _Call(self._module, self._inner)
        tensors = call.take(args, kwargs)
        with _KeptOnCpu(tensors) if self._offload else nullcontext():
            return checkpoint(call, *tensors, use_reentrant=False)

    def _mark_for_compiler(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call checkpoint, which is traced and becomes a mark on the graph."""
        modes = function_modes()

        def run(*args: Any) -> Any:
            with ExitStack() as stack:
                # the compiler hands checkpoint to the innermost mode as if it were an operation, and so loses the mode
                _enter_missing(modes, stack)
                return self._inner(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False)

    def of_copy(self, module: nn.Module) -> "CheckpointedForward":
        """Return what checkpoints a shallow copy of the module."""
        twin = copy.copy(self)
        twin._module = module
        inner: Any = self._inner
        twin.inner = inner.of_copy(module) if hasattr(inner, "of_copy") else inner
        return twin

    def remove(self) -> None:
        """Leave the module with the forward that it has inside."""
        if getattr(self._inner, "__func__", None) is type(self._module).forward:
            del self._module.forward
        else:
            self._module.forward = self._inner


def checkpointed_forward_of(module: nn.Module) -> CheckpointedForward | None:
    """Return what checkpoints a module, or None."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, CheckpointedForward) else None


def _say_that_compiled_code_does_not_offload() -> None:
    warnings.warn(
        "offload=True of checkpoint_activations does not reach into compiled code, which keeps the inputs of "
        "checkpointed modules on their device; leave it out, or do not compile these modules",
        DuotoneWarning,
        stacklevel=2,
    )


# called once, while tracing
mark_constant(_say_that_compiled_code_does_not_offload)


class _Call:
    """One call of a checkpointed module; called again, with the tensors that it took, it runs as it did before."""

    def __init__(self, module: nn.Module, inner: Callable[..., Any]) -> None:
        self._inner = inner
        self._given: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
        self._modes = function_modes()
        self._parameters = [_Held(store) for m in module.modules() if (store := parameters_of(m))]
        self._buffers = [_Held(store) for m in module.modules() if (store := buffers_of(m))]

    def take(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return every tensor in the arguments, once; checkpoint is to keep them, and the call keeps the rest."""
        self._given = args, kwargs
        leaves, self._structure = tree_flatten((args, kwargs))
        # a tensor given twice must stay one: attention takes another way where its query is its key
        positions: dict[Tensor, int] = {}
        self._leaves = [
            (positions.setdefault(leaf, len(positions)), None) if isinstance(leaf, Tensor) else (None, leaf)
            for leaf in leaves
        ]
        return list(positions)

    def __call__(self, *tensors: Tensor) -> Any:
        if self._given is not None:
            # the module gets the very lists and dicts that it was given, once: it may write to them
            (args, kwargs), self._given = self._given, None
            return self._inner(*args, **kwargs)
        leaves = [leaf if position is None else tensors[position] for position, leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._structure)
        with ExitStack() as stack:
            _enter_missing(self._modes, stack)
            for held in self._parameters:
                held.put_back(stack, copied=False)
            for held in self._buffers:
                # what the first run counted, running statistics for instance, is not counted twice
                held.put_back(stack, copied=held.was_written())
            return self._inner(*args, **kwargs)


class _Held:
    """The parameters or the buffers of one module, as they were: `functional_call` gives it others for a while."""

    def __init__(self, store: dict[str, Any]) -> None:
        self._store = store
        self._tensors = {name: tensor for name, tensor in store.items() if tensor is not None}
        self._versions = [version_of(tensor) for tensor in self._tensors.values()]

    def was_written(self) -> bool:
        """Return whether one of them was changed in place since."""
        return self._versions != [version_of(tensor) for tensor in self._tensors.values()]

    def put_back(self, stack: ExitStack, *, copied: bool) -> None:
        """Put them, or copies of them, in the module until `stack` unwinds."""
        for name, tensor in self._tensors.items():
            present = self._store.get(name)
            # FSDP2 has sharded and gathered parameters take turns, and knows best which is due
            if present is None or not (_is_plain(tensor) and _is_plain(present)):
                continue
            if copied or present is not tensor:
                stack.callback(self._store.__setitem__, name, present)
                self._store[name] = tensor.clone() if copied else tensor


class _KeptOnCpu(saved_tensors_hooks):
    """Moves a checkpointed module's inputs to the CPU, those that need a gradient, and brings them back."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        on_cpu = save_on_cpu(pin_memory=torch.cuda.is_available())
        # hooks are given a detached alias of the tensor, known by its address alone
        addresses = {tensor.data_ptr() for tensor in inputs if tensor.requires_grad}

        def pack(tensor: Tensor) -> tuple[torch.device, Tensor, int]:
            moves = tensor.data_ptr() in addresses
            device, kept = on_cpu.pack_hook(tensor) if moves else (tensor.device, tensor)
            return device, kept, version_of(kept)

        def unpack(packed: tuple[torch.device, Tensor, int]) -> Tensor:
            device, kept, version = packed
            # autograd checks this for tensors that it keeps itself
            if version_of(kept) != version:
                raise RuntimeError(
                    f"an input of shape {list(kept.shape)} of a checkpointed module was changed in place before the "
                    "backward pass needed it; change a copy of it instead"
                )
            return on_cpu.unpack_hook((device, kept))

        super().__init__(pack, unpack)


def _choose(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    # a shared module has several paths, and each may be the one that is named
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise PolicyError(f'a pattern is a text such as "blocks.*", not {pattern!r}; give several one by one')
        matching = [path for path in modules if fnmatchcase(path, pattern)]
        if not matching:
            raise PolicyError(
                f'pattern "{pattern}" matches no module inside this {type(model).__name__}, whose modules are '
                f"{', '.join([*modules][:5]) or 'itself alone'}{', ...' if len(modules) > 5 else ''}; correct it"
            )
        for path in matching:
            if type(modules[path]).forward is not nn.Module.forward:
                chosen[path] = modules[path]
            # where the pattern matches what is inside, too, a list of modules leaves it to those
            elif not any(other.startswith(f"{path}.") for other in matching):
                raise PolicyError(
                    f'pattern "{pattern}" matches "{path}", a {type(modules[path]).__name__}, which has no forward to '
                    f'run again; write "{path}.*" for the modules inside it'
                )
    outermost = [path for path in chosen if not any(path.startswith(f"{outer}.") for outer in chosen)]
    return list(dict.fromkeys(chosen[path] for path in outermost))


def _enter_missing(modes: list[TorchFunctionMode], stack: ExitStack) -> None:
    present = function_modes()
    # those that checkpoint was followed by may lie inside of what is missing
    while not torch.compiler.is_compiling() and len(modes) > len(present) > 0 and present[-1] in modes:
        mode = present.pop()
        # what a mode does besides, of a class of its own, is not undone
        TorchFunctionMode.__exit__(mode, None, None, None)
        stack.callback(TorchFunctionMode.__enter__, mode)
    for mode in modes:
        if not any(mode is other for other in present):
            stack.enter_context(mode)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
