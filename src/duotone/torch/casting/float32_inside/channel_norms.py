"""GroupNorm, BatchNorm and InstanceNorm of 16-bit data, computed in FP32: `y = round16((x - mean) * rstd * w + b)`.

torch 2.13 on CPUs keeps mean and `rstd` of norms whose weights are 16-bit or absent in 16 bits, so they get FP32
weights; its kernels then compute and sum in FP32. Kept for the backward pass are `x` in its 16 bits and one mean and
`rstd` for each group or channel. Gradients are rounded once to each operand's dtype, or not at all where its
`grad_dtype` says so. vmap's kernels take one dtype, and so does a gradient that vmap goes over: inside of vmap, of
forward-mode derivatives, and in a backward pass that is differentiated itself, all is FP32:

    grad_x = rstd * (g - mean(g) - u * mean(g * u)),  u = (x - mean) * rstd,  g = grad * w

where the means of gradients are left out if the statistics are given. Other devices' kernels of BatchNorm take FP32
weights, those of GroupNorm 16-bit ones; there vmap over the backward pass of BatchNorm is left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from duotone.torch.casting.float32_inside.autograd_function import apply
from duotone.torch.casting.float32_inside.norms import NARROW, cast_weight, records, takes_one_dtype, widened
from duotone.torch.casting.float32_inside.row_sums import grad_dtype_of
from duotone.torch.internals.autograd import transforms_are_active

_OF_GROUPS = torch.ops.aten.native_group_norm_backward.default
_OF_BATCH = torch.ops.aten.native_batch_norm_backward.default
# by the number of dimensions
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class _GroupNorm(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor, groups: int, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if takes_one_dtype(x, weight, bias):
            y, mean, rstd = torch.native_group_norm(x.float(), weight, bias, *_sizes(x), groups, eps)
            return y.to(x.dtype), mean, rstd
        return torch.native_group_norm(_dense(x, x), weight, bias, *_sizes(x), groups, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.groups, weight, _, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # once: a second look would run a checkpointed part again
        x, weight, mean, rstd = ctx.saved_tensors
        of_x, _, *of_weights, _ = ctx.needs_input_grad
        if _is_wide(grad, x, weight):
            shape = (x.shape[0], ctx.groups, x.shape[1] // ctx.groups, -1)
            statistics = (mean[..., None, None], rstd[..., None, None])
            grads = _gradients(grad, x, weight, statistics, shape, (2, 3), ctx.eps)
        else:
            wanted = [of_x, *of_weights]
            grads = _OF_GROUPS(_dense(grad, x), _dense(x, x), mean, rstd, weight, *_sizes(x), ctx.groups, wanted)
        return _wanted(ctx, grads, (0, 2, 3))


class _BatchNorm(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if takes_one_dtype(x, mean, var, weight, bias):
            y, own_mean, rstd = torch.native_batch_norm(x.float(), weight, bias, mean, var, training, momentum, eps)
            return y.to(x.dtype), own_mean, rstd
        return torch.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, mean, var, weight, _, ctx.training, _, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        # running statistics are changed by the next pass, and no part of the gradient where they are
        ctx.save_for_backward(x, weight, *(output[1:] if ctx.training else (mean, var)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, *statistics = ctx.saved_tensors
        of_x, _, _, *of_weights, _, _, _ = ctx.needs_input_grad
        if _is_wide(grad, x, weight, *statistics):
            mean, spread = (each[:, None, None] for each in statistics)
            rstd = spread if ctx.training else (spread + ctx.eps).rsqrt()
            shape = (x.shape[0], x.shape[1], 1, -1)
            grads = _gradients(grad, x, weight, (mean, rstd), shape, (0, 2, 3) if ctx.training else (), ctx.eps)
        else:
            own, given = (statistics, (None, None)) if ctx.training else ((None, None), statistics)
            grads = _OF_BATCH(grad, x, weight, *given, *own, ctx.training, ctx.eps, [of_x, *of_weights])
        return _wanted(ctx, grads, (0, 3, 4))


def _is_wide(grad: Tensor, x: Tensor, *others: Tensor) -> bool:
    return torch.is_grad_enabled() or takes_one_dtype(grad, x, *others) or grad_dtype_of(x) != x.dtype


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    statistics: tuple[Tensor, Tensor],
    shape: tuple[int, ...],
    dims: tuple[int, ...],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the FP32 gradients of data, weight and bias, written out.

    Args:
        grad: of the result.
        x: the data.
        weight: FP32, one for each channel.
        statistics: mean and `rstd`, to be broadcast to `shape`.
        shape: of the data as items, groups, channels of a group, and places.
        dims: over which statistics are taken; none if they are given.
        eps: what is added to a variance.
    """
    wide, of_y = (each.float().reshape(shape) for each in (x, grad))
    mean, rstd = statistics
    if dims and torch.is_grad_enabled():
        # a second derivative goes through them, which were kept as constants
        mean, var = wide.mean(dims, keepdim=True), wide.var(dims, correction=0, keepdim=True)
        rstd = (var + eps).rsqrt()
    unit = (wide - mean) * rstd
    of_unit = of_y * weight.reshape(shape[1], shape[2], 1)
    of_x = of_unit
    if dims:
        of_x = of_x - of_unit.mean(dims, keepdim=True) - unit * (of_unit * unit).mean(dims, keepdim=True)
    of_weight, of_bias = (each.sum((0, 3)).reshape(weight.shape) for each in (of_y * unit, of_y))
    return (of_x * rstd).reshape(x.shape), of_weight, of_bias


def _wanted(ctx: Any, grads: Sequence[Tensor], places: tuple[int, int, int]) -> tuple[Tensor | None, ...]:
    """Return gradients in the places of their operands, None for whatever needs none."""
    by_place = dict(zip(places, grads, strict=True))
    return tuple(by_place.get(place) if wanted else None for place, wanted in enumerate(ctx.needs_input_grad))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    items, channels, *places = x.shape
    count = 1
    for size in places:
        count *= size
    return items, channels, count


def _dense(tensor: Tensor, x: Tensor) -> Tensor:
    """Return a tensor as kernels of GroupNorm take it: with channels last if those of `x` are, otherwise in order."""
    layout = torch.contiguous_format
    if not x.is_contiguous() and x.dim() in _CHANNELS_LAST and x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()]):
        layout = _CHANNELS_LAST[x.dim()]
    return tensor.contiguous(memory_format=layout)


def group_norm_in_float32(
    func: Callable[..., Any],
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Call `F.group_norm` so that its statistics are FP32 and its sums, too.

    Args:
        func: `F.group_norm`; its arguments follow. Data and weights may differ in dtype.

    Returns:
        The normalized data, in their dtype.

    >>> from torch.nn import functional as F
    >>> group_norm_in_float32(F.group_norm, torch.ones(1, 4, 2).half(), 2, bias=torch.ones(4)).dtype
    torch.float16
    """
    dtype = input.dtype
    if dtype not in NARROW or not input.is_cpu:
        return func(input, num_groups, cast_weight(weight, dtype), cast_weight(bias, dtype), eps)
    weight, bias = widened(weight), widened(bias)
    if takes_one_dtype(input, weight, bias):
        return func(input.float(), num_groups, weight, bias, eps).to(dtype)
    # the kernel keeps its statistics in the dtype of the weight; without one, in that of x
    if weight is None and input.dim() > 1:
        weight = torch.ones(input.shape[1])
    # a shape that does not fit is left to torch to refuse
    if records(input, weight, bias) and not torch.compiler.is_compiling() and _fits(input, weight, bias):
        items, channels, places = _sizes(input)
        if num_groups > 0 and channels % num_groups == 0 and items * channels * places > num_groups:
            return apply(_GroupNorm, input, num_groups, weight, bias, eps)[0]
    return func(input, num_groups, weight, bias, eps)


def batch_norm_in_float32(
    func: Callable[..., Any],
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *rest: Any,
) -> Tensor:
    """Call `F.batch_norm` with FP32 weights, so that its statistics are FP32 and its sums, too.

    Args:
        func: `F.batch_norm`; its arguments follow. Weights may be 16-bit beside data and running statistics in FP32,
            and the other way round.

    Returns:
        The normalized data, in their dtype.

    >>> from torch.nn import functional as F
    >>> x = (1024 + torch.arange(4.0)).bfloat16().view(4, 1)
    >>> batch_norm_in_float32(F.batch_norm, x, training=True).sum()
    tensor(0., dtype=torch.bfloat16)
    """
    given = (running_mean, running_var)
    weight, bias = _weights(input, running_mean, weight, bias)
    if _is_widened(input, *given, weight, bias):
        return func(input.float(), *given, weight, bias, training, momentum, eps, *rest).to(input.dtype)
    if _is_replaced(input, training, *given, weight, bias) and (not training or input.numel() > input.shape[1]):
        return apply(_BatchNorm, input, *given, weight, bias, training, momentum, eps)[0]
    return func(input, *given, weight, bias, training, momentum, eps, *rest)


def instance_norm_in_float32(
    func: Callable[..., Any],
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *rest: Any,
) -> Tensor:
    """Call `F.instance_norm` in the same way: as a BatchNorm that takes each channel of each item for a channel.

    >>> from torch.nn import functional as F
    >>> x = (1024 + torch.arange(4.0)).bfloat16().view(1, 1, 4)
    >>> instance_norm_in_float32(F.instance_norm, x).sum()
    tensor(0., dtype=torch.bfloat16)
    """
    given = (running_mean, running_var)
    weight, bias = _weights(input, running_mean, weight, bias)
    if _is_widened(input, *given, weight, bias):
        return func(input.float(), *given, weight, bias, use_input_stats, momentum, eps, *rest).to(input.dtype)
    if not _is_replaced(input, use_input_stats, *given, weight, bias) or (use_input_stats and _sizes(input)[2] == 1):
        return func(input, *given, weight, bias, use_input_stats, momentum, eps, *rest)
    items, channels, *places = input.shape
    mean, var, weight, bias = (None if each is None else each.repeat(items) for each in (*given, weight, bias))
    flat = input.contiguous().view(1, items * channels, *places)
    y = apply(_BatchNorm, flat, mean, var, weight, bias, use_input_stats, momentum, eps)[0]
    for running, each in zip(given, (mean, var), strict=True):
        if use_input_stats and running is not None and each is not None:
            running.copy_(each.view(items, channels).mean(0))
    return y.view(input.shape)


def torch_batch_norm_in_float32(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Call `torch.batch_norm`, whose arguments stand in another order, in the same way.

    Args:
        func: the function; its arguments follow.

    Returns:
        The normalized data, in their dtype.
    """
    return _reordered(batch_norm_in_float32, func, *args, **kwargs)


def torch_instance_norm_in_float32(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Call `torch.instance_norm`, whose arguments stand in another order, in the same way.

    Args:
        func: the function; its arguments follow.

    Returns:
        The normalized data, in their dtype.
    """
    return _reordered(instance_norm_in_float32, func, *args, **kwargs)


def _reordered(
    call: Callable[..., Tensor],
    func: Callable[..., Any],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *rest: Any,
    **named: Any,
) -> Tensor:
    def reordered(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, *rest: Any) -> Tensor:
        return func(x, weight, bias, mean, var, *rest)

    names = ("use_input_stats" if call is instance_norm_in_float32 else "training", "momentum", "eps", "cudnn_enabled")
    rest = (*rest, *(named[name] for name in names[len(rest) :]))
    return call(reordered, input, running_mean, running_var, weight, bias, *rest)


def _weights(
    input: Tensor, running_mean: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return FP32 weights, unless running statistics are in 16 bits."""
    if running_mean is not None and running_mean.dtype != torch.float32:
        return weight, bias
    # the kernel keeps its statistics in the dtype of the weight; without one, in that of x
    if weight is None and input.is_cpu and input.dtype in NARROW and input.dim() > 1:
        weight = torch.ones(input.shape[1])
    return widened(weight), widened(bias)


def _is_widened(input: Tensor, *others: Tensor | None) -> bool:
    return input.dtype in NARROW and input.is_cpu and takes_one_dtype(input, *others)


def _is_replaced(
    input: Tensor,
    training: bool,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> bool:
    """Return whether 16-bit data are normalized here, and not by torch's own function."""
    if input.dtype not in NARROW or not input.is_cpu or not records(input, weight, bias):
        return False
    # the kernel does not check that it has statistics
    if torch.compiler.is_compiling() or (mean is None) != (var is None) or (mean is None and not training):
        return False
    if mean is not None and training and transforms_are_active():
        # torch.func refuses to change running statistics
        return False
    for each in (mean, var, weight, bias):
        if each is not None and each.dtype is not torch.float32:
            return False
    return _fits(input, mean, var, weight, bias)


def _fits(input: Tensor, *others: Tensor | None) -> bool:
    """Return whether data have elements, and all else has one for each channel; torch refuses what does not fit."""
    if input.dim() < 2 or input.numel() == 0:
        return False
    shape = input.shape[1:2]
    return not any(each is not None and each.shape != shape for each in others)
