"""Functions that torch.compile traces from inside of what it compiles, and never on their own.

Where a graph breaks inside of a region, the code in it runs under modes that are already entered, and torch.compile
would compile each call of a mode by itself. For that it tells functions apart by their kind alone, and runs for
`tensor.device` what it compiled for `tensor.shape` (torch 2.13). What switches autocast on has to leave it on, which
compiled code cannot. What such a function calls runs as it is, too.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from duotone.torch.internals.compiler import SKIPS_CODE, say_once_that_code_is_not_skipped, skip_code

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
    if SKIPS_CODE:
        skip_code(function.__code__)
        return function

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            say_once_that_code_is_not_skipped()
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
