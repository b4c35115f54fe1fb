"""FP32 parameters that represent 16-bit ones in an optimizer for the time of a step: masters and true gradients."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from duotone.torch.kernels import Edits
from duotone.torch.kernels.layout import dense
from duotone.torch.parameters import shards
from duotone.torch.parameters.masters import read_masters
from duotone.torch.parameters.storage import other_attributes


def stand_ins_for(
    params: Collection[Tensor], grad_multiplier: Tensor | None, edits: Callable[[torch.device], Edits | None]
) -> dict[Tensor, nn.Parameter]:
    """Return an FP32 parameter for each of an optimizer's; one in FP32 shares its memory if that is dense.

    Args:
        params: parameters with the tails that they need.
        grad_multiplier: what gradients are multiplied by: FP32, 0-d; None for 1.
        edits: returns where to note, on a device, that weights were changed.
    """
    masters = iter(read_masters([param for param in params if param.dtype != torch.float32], edits))
    return {
        param: _stand_in(
            param, dense(param.detach()) if param.dtype == torch.float32 else next(masters), grad_multiplier
        )
        for param in params
    }


def _stand_in(param: Tensor, master: Tensor, grad_multiplier: Tensor | None) -> nn.Parameter:
    stand_in = nn.Parameter(master, requires_grad=param.requires_grad)
    # some optimizers look for what their users set on a parameter
    for name, value in other_attributes(param).items():
        setattr(stand_in, name, value)
    if param.grad is None:
        return stand_in
    # fused kernels go through memory, so it lies as the master does
    grad = torch.empty_like(shards.local(master)).copy_(shards.gradient_part(param).detach())
    if grad_multiplier is not None:
        grad.mul_(grad_multiplier.to(grad.device))
    stand_in.grad = shards.like(grad, master)
    return stand_in
