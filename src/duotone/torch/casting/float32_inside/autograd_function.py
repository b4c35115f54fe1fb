"""Calling a `torch.autograd.Function` that has a `setup_context`, at the price of one without.

For such a function torch 2.13 inspects the signature of `forward` in each call, which takes 70 microseconds: more than
a small norm. There is nothing to inspect where every argument is given by position. Where derivatives
are left to torch, `forward` alone is run. Left out: named arguments and defaults.
"""

from typing import Any

import torch
from torch.autograd import Function

from duotone.torch.internals.autograd import in_forward_mode, transforms_are_active


def apply(function: type[Function], *args: Any) -> Any:
    """Return what `function.apply(*args)` returns.

    Args:
        function: the function.
        args: every argument of its `forward`.

    >>> class Double(Function):
    ...     @staticmethod
    ...     def forward(x):
    ...         return 2 * x
    ...
    ...     @staticmethod
    ...     def setup_context(ctx, inputs, output):
    ...         pass
    ...
    ...     @staticmethod
    ...     def backward(ctx, grad):
    ...         return 2 * grad
    >>> apply(Double, torch.ones(1, requires_grad=True))
    tensor([2.], grad_fn=<DoubleBackward>)
    """
    if leaves_gradients_to_torch():
        return function.forward(*args)
    if is_eager():
        return super(Function, function).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]
    return function.apply(*args)


def is_eager() -> bool:
    """Return whether neither torch.compile looks on nor a transform of torch.func is under way.

    >>> is_eager(), torch.func.vmap(lambda x: x + is_eager())(torch.zeros(1))
    (True, tensor([0.]))
    """
    return not torch.compiler.is_compiling() and not transforms_are_active()


def leaves_gradients_to_torch() -> bool:
    """Return whether the derivatives of a function are to be those of what it calls.

    It is so for forward-mode derivatives, for which these functions have no formula, and for transforms of torch.func
    that are compiled: torch 2.13 traces `forward` alone there, and takes no notice of `backward`.

    >>> leaves_gradients_to_torch()
    False
    """
    return in_forward_mode() or (torch.compiler.is_compiling() and transforms_are_active())
