"""What lets `torch.utils.checkpoint` find a function mode again when it runs a function a second time.

Checkpoint restores autocast and random numbers for the second run, and no function mode. A mode that calls
`follow_checkpoint` from its `__torch_function__` is entered for it too: what checkpoint calls then is found from inside
the first run, in the hooks on saved tensors for the kind without reentrant autograd, and on the stack, where the first
run switches gradients off, for the other. Nothing else in Duotone reads checkpoint from the inside. Whether that works
with this torch is tried once, before the first checkpoint is followed; if not, a warning says so. Left out: whoever
reimplements checkpoint, and hooks of the user's own inside of the checkpointed function around everything it calls.
"""

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from duotone.call_site import warn
from duotone.torch.casting.tracing import not_by_itself
from duotone.torch.internals.autograd import set_grad_enabled, top_saved_hooks
from duotone.torch.internals.lookup import find, has_all

_CHECKPOINT = "torch.utils.checkpoint"
# what runs the function again without reentrant autograd; the hooks on saved tensors have it in their closures
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/checkpoint.py#L816
_CheckpointFrame: Any = find(f"{_CHECKPOINT}:_CheckpointFrame", ())
# what runs it the first time with reentrant autograd; its `ctx` has the function that is run again
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/checkpoint.py#L234
_forward: Any = find(f"{_CHECKPOINT}:CheckpointFunction.forward")
_FORWARD_CODE = getattr(_forward, "__code__", None)
_HAS_NAMES = has_all(_CHECKPOINT, "_top_saved_tensors", "_set_grad_enabled")
# whose frames lie between a mode and whoever switched gradients off
_BETWEEN = (torch.no_grad.__module__, not_by_itself.__module__, __name__)


def innermost_hook() -> Callable[[], Any] | None:
    """Return a weak reference to the innermost hook on saved tensors, or None; what a mode notes as it is entered."""
    if not _HAS_NAMES:
        say_once_what_is_not_followed()
    hooks = top_saved_hooks(False)
    return None if hooks is None else weakref.ref(hooks[0])


def follow_checkpoint(
    mode: TorchFunctionMode,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    outer_hook: Callable[[], Any] | None = None,
) -> tuple[Any, ...]:
    """Have a mode entered again wherever the function is run again that checkpoint runs now, if it does.

    Args:
        mode: a mode that has been called, and is off for the length of that call.
        func: what it was called for.
        args: its positional arguments.
        outer_hook: `innermost_hook` when the mode was entered; a mode that a checkpointed function itself enters is not
            entered around all of it.

    Returns:
        The arguments to go on with.

    Warns:
        DuotoneWarning: this torch's checkpoint cannot be followed; once.

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
    hooks = top_saved_hooks(False)
    if hooks is not None or func is set_grad_enabled:
        say_once_what_is_not_followed()
        _follow(mode, func, hooks, outer_hook)
    return args


def _follow(
    mode: TorchFunctionMode, func: Callable[..., Any], hooks: Any, outer_hook: Callable[[], Any] | None = None
) -> None:
    if hooks is not None and getattr(hooks[0], "__module__", None) == _CHECKPOINT:
        _follow_hook(mode, hooks[0], None if outer_hook is None else outer_hook())
    if func is set_grad_enabled:
        caller = sys._getframe(1)
        # no further than modes and no_grad: whoever else switches gradients off does so inside of the function
        while caller is not None and (
            caller.f_code.co_name == "__torch_function__" or caller.f_globals.get("__name__") in _BETWEEN
        ):
            caller = caller.f_back
        if caller is not None and caller.f_code is _FORWARD_CODE:
            node = caller.f_locals["ctx"]
            node.run_function = _again(node.run_function, mode)


@functools.cache
def say_once_what_is_not_followed() -> None:
    """Try both kinds of checkpoint, the first time, and warn of those whose second run a mode is not entered for."""
    failing = [kind for kind in (False, True) if not _is_followed(kind)]
    if failing:
        warn(
            f"{_CHECKPOINT} of torch {torch.__version__} is not made as Duotone reads it (use_reentrant="
            f"{' and '.join(map(str, failing))}): functions that it runs again in the backward pass compute without "
            "the rules of a cast model, perhaps in another dtype; use duotone.torch.checkpoint_activations",
        )


def _is_followed(use_reentrant: bool) -> bool:
    """Return whether a mode is entered again by a kind of checkpoint."""
    mode = _Counting()

    def attempt() -> None:
        x = torch.zeros(1, requires_grad=True)
        # whatever a torch that is made otherwise may raise
        with suppress(Exception):
            with mode:
                y: Any = checkpoint(torch.exp, x, use_reentrant=use_reentrant, preserve_rng_state=False)
            y.backward()

    # a thread of its own knows no mode, hook or transform of the one that asks
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return mode.calls == 2


class _Counting(TorchFunctionMode):
    """Counts the calls of `torch.exp`, and follows checkpoint."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _follow(self, func, top_saved_hooks(False))
        self.calls += func is torch.exp
        return func(*args, **(kwargs or {}))


def _follow_hook(mode: TorchFunctionMode, hook: Callable[..., Any], outer: Any) -> None:
    for cell in () if hook is outer else hook.__closure__ or ():
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
