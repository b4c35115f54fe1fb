"""Gradients made true in place, for code that reads or changes them between backward pass and step.

A step needs none of this: it takes the scale out while it updates. FP16 gradients are widened to FP32 first, for the
scale is what keeps them from underflowing in FP16; after the step they get their own dtype back.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from duotone.torch.internals.dispatch import multiply_all
from duotone.torch.internals.tensors import sparse_values
from duotone.torch.internals.training import check_and_unscale
from duotone.torch.kernels import grad_stats
from duotone.torch.parameters.shards import local


@torch.no_grad()
def unscale_(params: list[Tensor], inverse_scale: Tensor) -> list[Tensor]:
    """Multiply the gradients of parameters by 1 / loss_scale, in place; FP16 ones become FP32.

    Exact but for results below the normal range of their dtype. Inf and NaN stay, as does -0; an empty list is fine.

    Args:
        params: parameters with a gradient.
        inverse_scale: FP32, 0-d.

    Returns:
        The parameters whose gradients were widened; `narrow` undoes that.

    >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    >>> weight.grad = torch.full_like(weight, 2.0**-24)
    >>> widened = unscale_([weight], torch.tensor(2.0**-16))
    >>> weight.grad.dtype, weight.grad[0].item() == 2.0**-40
    (torch.float32, True)
    """
    widened = [param for param in params if param.grad is not None and param.grad.dtype == torch.float16]
    for param in widened:
        _change_grad_dtype(param, torch.float32)
    grads: dict[torch.device, list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            part = local(param.grad)
            grads.setdefault(part.device, []).append(part)
    for device, parts in grads.items():
        multiply_all(parts, inverse_scale.to(device))
    return widened


@torch.no_grad()
def narrow(widened: list[Tensor]) -> None:
    """Give gradients that `unscale_` widened their parameter's dtype back, rounded to nearest."""
    for param in widened:
        _change_grad_dtype(param, torch.float16)


@torch.no_grad()
def unscale_and_check_(
    params: Iterable[Tensor], inverse_scale: Tensor, found_inf: Tensor
) -> dict[torch.device, Tensor]:
    """Multiply gradients of any kind by 1 / loss_scale, in place and in their own dtype.

    With torch's kernel for it, where it has one.

    Args:
        params: some may have no gradient; sparse gradients are taken too.
        inverse_scale: FP32, 0-d.
        found_inf: FP32, 0-d, 0 or 1: what is known already.

    Returns:
        For each device with a gradient, `found_inf`, or 1 if an Inf or a NaN is in one there.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.grad = torch.tensor([8.0, torch.inf])
    >>> unscale_and_check_([weight], torch.tensor(0.5), torch.tensor(0.0)), weight.grad
    ({device(type='cpu'): tensor(1.)}, tensor([4., inf]))
    """
    parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            part = _values_of(param)
            # torch's kernel takes real numbers
            part = torch.view_as_real(part) if part.is_complex() else part
            parts.setdefault((part.device, part.dtype), []).append(part)
    flags: dict[torch.device, Tensor] = {}
    for (device, dtype), grads in parts.items():
        if device not in flags:
            flags[device] = found_inf.to(device, copy=True)
        # torch's kernel takes BF16 on CPUs alone: https://github.com/pytorch/pytorch/issues/127176
        has_kernel = dtype != torch.bfloat16 or device.type == "cpu"
        (check_and_unscale if has_kernel else check_and_multiply)(grads, flags[device], inverse_scale.to(device))
    return flags


def check_and_multiply(grads: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Do what torch's kernel does, in a pass that reads gradients and one that multiplies them.

    Args:
        grads: in FP32, BF16 or FP16, all on one device; multiplied by `inverse_scale` in place.
        found_inf: FP32, 0-d; made 1 if an Inf or a NaN is among them.
        inverse_scale: FP32, 0-d.

    >>> grads, found_inf = [torch.tensor([8.0, torch.inf]).bfloat16()], torch.zeros(())
    >>> check_and_multiply(grads, found_inf, torch.tensor(0.5))
    >>> grads, found_inf
    ([tensor([4., inf], dtype=torch.bfloat16)], tensor(1.))
    """
    found_inf.masked_fill_(grad_stats(grads, inverse_scale)[1], 1.0)
    multiply_all(grads, inverse_scale)


def _values_of(param: Tensor) -> Tensor:
    """Return the memory of a parameter's gradient, of this rank's part."""
    grad = param.grad
    assert grad is not None
    if not grad.is_sparse:
        return local(grad)
    # finite FP16 values of one element may sum up to Inf
    if grad.dtype == torch.float16:
        grad = param.grad = grad.coalesce()
    return sparse_values(grad)


def _change_grad_dtype(param: Tensor, dtype: torch.dtype) -> None:
    # torch checks one against the other, so the gradient is away in between
    grad, param.grad = param.grad, None
    param.grad_dtype = dtype  # type: ignore[attr-defined]
    param.grad = None if grad is None else grad.to(dtype)
