"""What lets `torch.utils.checkpoint` find a function mode again when it runs a function a second time.

Checkpoint restores autocast and random numbers for the second run, and no function mode. A mode that calls
`follow_checkpoint` from its `__torch_function__` is entered for it too: what checkpoint calls then is found from inside
the first run, in the hooks on saved tensors for the kind without reentrant autograd, and on the stack, where the first
run switches gradients off, for the other. Left out: whoever reimplements checkpoint, and hooks of the user's own inside
of the checkpointed function around everything it calls.
"""

import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch._C import _autograd
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame, checkpoint

_GRAD_MODE = torch.no_grad.__module__


def hooks_around() -> Callable[[], Any] | None:
    """Return a weak reference to the innermost hook on saved tensors, or None; what a mode notes as it is entered."""
    hooks = _autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else weakref.ref(hooks[0])


def follow_checkpoint(
    mode: TorchFunctionMode,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    around: Callable[[], Any] | None = None,
) -> tuple[Any, ...]:
    """Have a mode entered again wherever the function is run again that checkpoint runs now, if it does.

    Args:
        mode: a mode that has been called, and is off for the length of that call.
        func: what it was called for.
        args: its positional arguments.
        around: `hooks_around` when the mode was entered; a mode that a checkpointed function itself enters is not
            entered around all of it.

    Returns:
        The arguments to go on with.

    >>> class Tripling(TorchFunctionMode):
    ...     def __torch_function__(self, func, types, args=(), kwargs=None):
    ...         follow_checkpoint(self, func, args)
    ...         result = func(*args, **(kwargs or {}))
    ...         return result * 3 if func is torch.exp else result
    >>> x = torch.zeros(1, requires_grad=True)
    >>> with Tripling():
    ...     y = torch.utils.checkpoint.checkpoint(lambda x: torch.exp(torch.exp(x)), x, use_reentrant=False)
    >>> y.backward()
    >>> torch.equal(x.grad, 3 * y)  # 3 exp(3 exp(x)) * 3 exp(x)
    True
    """
    if torch.compiler.is_compiling():
        # a tracer hands checkpoint itself to the innermost mode, and traces its function without the mode
        return (_in_mode(mode, args[0]), *args[1:]) if func is checkpoint and args else args
    hooks = _autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and getattr(hooks[0], "__module__", None) == CheckpointFunction.__module__:
        _follow_hook(mode, hooks[0], None if around is None else around())
    if func is torch._C._set_grad_enabled:
        caller = sys._getframe(1)
        # no further than modes and no_grad: whoever else switches gradients off does so inside of the function
        while caller is not None and (
            caller.f_code.co_name == "__torch_function__" or caller.f_globals.get("__name__") == _GRAD_MODE
        ):
            caller = caller.f_back
        if caller is not None and caller.f_code is CheckpointFunction.forward.__code__:
            node = caller.f_locals["ctx"]
            node.run_function = _again(node.run_function, mode)
    return args


def _follow_hook(mode: TorchFunctionMode, hook: Callable[..., Any], around: Any) -> None:
    for cell in () if hook is around else hook.__closure__ or ():
        frame = cell.cell_contents
        if isinstance(frame, _CheckpointFrame):
            frame.recompute_fn = _again(frame.recompute_fn, mode)


def _in_mode(mode: TorchFunctionMode, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    return run


class _Again:
    """A function that runs in modes, which do not get in one another's way."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.modes: list[TorchFunctionMode] = []

    def __call__(self, *args: Any) -> Any:
        with ExitStack() as stack:
            for mode in self.modes:
                stack.enter_context(mode)
            return self.function(*args)


def _again(function: Callable[..., Any], mode: TorchFunctionMode) -> _Again:
    again = function if isinstance(function, _Again) else _Again(function)
    if mode not in again.modes:
        again.modes.append(mode)
    return again
