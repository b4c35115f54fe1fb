"""Samples of Dirichlet and Beta distributions with 16-bit concentrations: drawn and differentiated in FP32.

torch has kernels neither for them nor for their gradient in 16 bits. torch.distributions draws in an autograd function
of its own, which keeps the concentration as it was given for the backward pass, where no region is entered any more: it
is given the widened one to keep. The gradient is rounded once to the concentration's dtype. Left out: torch.compile.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from duotone.errors import OperationError
from duotone.torch.internals.autograd import context_of_sample

_NARROW = ("torch.bfloat16", "torch.float16")


def sample_in_float32(func: Callable[..., Any], concentration: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Draw from a Dirichlet distribution, in FP32.

    Args:
        func: `torch._sample_dirichlet`, or the operator; its arguments follow.

    Raises:
        OperationError: the sample is to have a gradient, and this torch does not show who keeps the concentration.

    >>> import torch
    >>> sample_in_float32(torch._sample_dirichlet, torch.ones(3).bfloat16()).dtype
    torch.float32
    """
    wide = concentration.float() if str(concentration.dtype) in _NARROW else concentration
    if wide is concentration:
        return func(concentration, *args, **kwargs)
    if concentration.requires_grad and not _keep(concentration, wide):
        dtype = str(concentration.dtype).removeprefix("torch.")
        raise OperationError(
            f"samples of a Dirichlet or Beta distribution have no gradient in {dtype} here; make it of FP32 "
            "concentrations, Dirichlet(x.float())"
        )
    return func(wide, *args, **kwargs)


def _keep(concentration: Tensor, wide: Tensor) -> bool:
    """Have the function that draws keep `wide` for its backward pass; return whether it was found."""
    context = context_of_sample()
    if context is None:
        return False

    def save(*tensors: Tensor) -> None:
        # it is the class's own again: what a context holds of itself is freed late
        del context.save_for_backward
        context.save_for_backward(*(wide if each is concentration else each for each in tensors))

    context.save_for_backward = save
    return True
