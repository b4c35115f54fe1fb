"""Functions that torch.compile traces from inside of what it compiles, and never on their own.

Where a graph breaks inside of a region, the code in it runs under modes that are already entered, and torch.compile
would compile each call of a mode by itself. For that it tells functions apart by their kind alone, and runs for
`tensor.device` what it compiled for `tensor.shape` (torch 2.13). What switches autocast on has to leave it on, which
compiled code cannot. What such a function calls runs as it is, too.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

Function = TypeVar("Function", bound=Callable[..., Any])


def not_by_itself(function: Function) -> Function:
    """Return a function that is not compiled by itself, nor is what it calls; traced from outside, it still is.

    >>> import torch
    >>> @not_by_itself
    ... def is_compiled() -> bool:
    ...     return torch.compiler.is_compiling()
    >>> torch.compile(is_compiled, backend="eager")()
    False
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function
