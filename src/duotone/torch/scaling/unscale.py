"""Gradients made true in place, for whoever wants to look at them or change them between backward pass and step.

A step needs none of this: it takes the scale out while it updates. FP16 gradients are widened to FP32 first, for the
scale is what keeps them from underflowing in FP16; after the step they get their own dtype back.
"""

import torch
from torch import Tensor

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
        _exchange_dtype(param, torch.float32)
    by_device: dict[torch.device, list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            grad = local(param.grad)
            by_device.setdefault(grad.device, []).append(grad)
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, inverse_scale.to(device))  # type: ignore[attr-defined]
    return widened


@torch.no_grad()
def narrow(widened: list[Tensor]) -> None:
    """Give gradients that `unscale_` widened their parameter's dtype back, rounded to nearest."""
    for param in widened:
        _exchange_dtype(param, torch.float16)


def _exchange_dtype(param: Tensor, dtype: torch.dtype) -> None:
    # torch checks one against the other, so the gradient is away in between
    grad, param.grad = param.grad, None
    param.grad_dtype = dtype  # type: ignore[attr-defined]
    param.grad = None if grad is None else grad.to(dtype)
