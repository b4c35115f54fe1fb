"""Windows that overlap, in 16 bits: an element's gradient is the sum of what every window gives that it is in.

torch's CPU kernels add these up in the dtype of the data, so that in BF16 a sum stalls at 256 of its first term. Here
the function runs on widened operands where more than a few terms meet in one place; in all other calls, and without a
gradient, it is left as it is. Forward, maxima and copies are exact anyway.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from duotone.torch.casting.float32_inside.gathers import needs_sum
from duotone.torch.casting.widened import widen_to_data

# as many terms as a window of 3 x 3 has: their sum in 16 bits is off by about one rounding
_FEW = 9


def max_pool_in_float32(rank: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a pool of maxima with a gradient summed in FP32.

    Args:
        rank: of how many dimensions a window is; one number means as long in each of them.
        func: `F.max_pool1d`, `F.max_pool2d`, `F.max_pool3d`, or the operator of that name.
        args: its arguments: the data, the window, the stride, ...
        kwargs: its named arguments.

    >>> import torch
    >>> x = torch.ones(1, 1, 3000, dtype=torch.bfloat16).index_fill(2, torch.tensor([1500]), 2).requires_grad_()
    >>> y = max_pool_in_float32(1, torch.nn.functional.max_pool1d, (x, 1000, 1), {})
    >>> y.float().sum().backward()
    >>> x.grad[0, 0, 1500].item()
    1000.0
    """
    kernel, stride = _argument(args, kwargs, 1, "kernel_size", 1), _argument(args, kwargs, 2, "stride", None)
    return _call(func, args, kwargs, _terms(kernel, stride or kernel, rank))


def unfold_in_float32(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call `F.unfold` with a gradient summed in FP32.

    Args:
        func: `F.unfold`, or the operator `im2col`.
        args: its arguments: the data, the window, dilation, padding and stride.
        kwargs: its named arguments.
    """
    kernel, stride = _argument(args, kwargs, 1, "kernel_size", 1), _argument(args, kwargs, 4, "stride", 1)
    return _call(func, args, kwargs, _terms(kernel, stride, 2))


def slide_in_float32(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call `Tensor.unfold` with a gradient summed in FP32.

    Args:
        func: the method, or the operator.
        args: its arguments: the data, the dimension, size and step of the window.
        kwargs: its named arguments.
    """
    size, step = _argument(args, kwargs, 2, "size", 1), _argument(args, kwargs, 3, "step", 1)
    return _call(func, args, kwargs, _terms(size, step, 1))


def pad_in_float32(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call `F.pad` so that the gradient of an edge that was copied many times is summed in FP32.

    Args:
        func: `F.pad`, or the operator.
        args: its arguments: the data, the widths, the mode, the value.
        kwargs: its named arguments.
    """
    if _argument(args, kwargs, 2, "mode", "constant") != "replicate":
        return func(*args, **kwargs)
    widths = _argument(args, kwargs, 1, "pad", ())
    # a corner is copied along every dimension
    terms = math.prod(1 + max(0, *widths[at : at + 2]) for at in range(0, len(widths), 2))
    return _call(func, args, kwargs, terms)


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], terms: int) -> Any:
    data = _argument(args, kwargs, 0, "input", None)
    if terms <= _FEW or not isinstance(data, Tensor) or not needs_sum(data):
        return func(*args, **kwargs)
    return widen_to_data(func, args, kwargs)


def _terms(kernel: int | Sequence[int], stride: int | Sequence[int], rank: int) -> int:
    """Return how many windows an element is in at most."""
    kernels = [kernel] * rank if isinstance(kernel, int) else [*kernel]
    strides = [stride] * rank if isinstance(stride, int) else [*stride]
    # one number in a list stands for every dimension, too
    kernels, strides = (each * rank if len(each) == 1 else each for each in (kernels, strides))
    # torch.compile follows no generator into math.prod
    terms = 1
    for length, step in zip(kernels, strides, strict=False):
        terms *= -(-length // max(1, step))
    return terms


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, otherwise: Any) -> Any:
    return args[place] if place < len(args) else kwargs.get(name, otherwise)
