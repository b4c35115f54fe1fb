"""Runs a function under an observer: hooks on the model's modules, modes over torch's functions and kernels."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from duotone.torch.internals import compiler
from duotone.torch.internals.autograd import in_backward
from duotone.torch.internals.compiler import is_loaded, original_of, written_path
from duotone.torch.watching.modes import watch_operations
from duotone.torch.watching.observer import Observer
from duotone.torch.watching.saved import watch_saved


def watch(model: nn.Module, run: Callable[[], object], observer: Observer) -> None:
    """Call `run` with gradients enabled, and tell the observer what happens, in the modules of `model` and outside.

    Compiled parts run as they are written.
    """
    with ExitStack() as stack:
        if is_loaded():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_hooks(model, observer))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(watch_saved(observer.add_saved))
        watch_operations(run, observer)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module with its path as written, without what torch.compile puts around modules.

    >>> [path for path, _ in named_modules(nn.Sequential(nn.ReLU()))]
    ['', '0']
    """
    for path, module in model.named_modules():
        if original_of(module) is module:
            yield written_path(path), module


def is_compiled(model: nn.Module) -> bool:
    """Return whether a model, or a part of it, is compiled.

    >>> is_compiled(nn.Sequential(nn.ReLU()))
    False
    """
    return any(compiler.is_compiled(module) for module in model.modules())


@contextmanager
def _hooks(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Follow which module is running, and what each takes and returns."""
    handles = []
    try:
        for path, module in named_modules(model):
            if isinstance(module, torch.jit.ScriptModule):
                continue

            def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                observer.running.append(path)
                # a part that is computed again on the way back has been seen
                if not in_backward():
                    observer.add_inputs(path, (args, kwargs))

            def after(_: nn.Module, args: Any, outputs: Any, path: str = path) -> None:
                observer.running.pop()
                if not in_backward():
                    observer.add_outputs(path, outputs)

            handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            # also after an error, which the model may catch
            handles.append(module.register_forward_hook(after, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
