"""Functions that `torch.compile` is to leave alone, since they go through raw addresses, which it cannot follow."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from duotone.torch.internals.compiler import compiler_follows

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Return a function that runs as it is, inside a compiled one too.

    >>> uncompiled(abs)(-1)
    1
    """
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # the compiler's own wrapper takes as long as all that a step does in Python around its kernels
        if not compiler_follows():
            return function(*args, **kwargs)
        # at the first call, for it loads the compiler
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call  # type: ignore[return-value]
