"""Cross-entropy of 16-bit logits on CUDA by Duotone's own kernels: 6 bytes of memory traffic per logit in all.

Forward reads logits once and keeps 8 bytes of each row, backward reads them once more and writes the gradient: over
the logits, if nobody else can reach them. FP32 inside; the gradient is rounded once. Its kernels ran in Triton's
interpreter only, not yet on a GPU. Left out: what `cross_entropy` leaves to torch, and logits whose classes are not
beside each other in memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from duotone.torch.internals.autograd import increment_version
from duotone.torch.internals.sharing import may_write_over
from duotone.torch.kernels import has_fused_kernels


def takes(logits: Tensor, target: Tensor) -> bool:
    """Return whether these kernels run on `(N, C)` logits and their targets.

    >>> takes(torch.zeros(2, 3).bfloat16(), torch.tensor([0, 1]))
    False
    """
    # a subclass, as a fake tensor is, may have no memory
    is_plain = type(logits) is Tensor and type(target) is Tensor and logits.is_cuda and target.is_cuda
    return is_plain and is_in_rows(logits) and has_fused_kernels(logits.device)


def is_in_rows(logits: Tensor) -> bool:
    """Return whether logits are a table whose classes are beside each other in memory.

    >>> is_in_rows(torch.zeros(2, 3)), is_in_rows(torch.zeros(3, 2).t())
    (True, False)
    """
    return logits.dim() == 2 and logits.stride(1) == 1 and logits.numel() > 0


class FusedCrossEntropy(Function):
    """The loss, what a mean was divided by, and 8 bytes of each row that its gradient needs."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        from duotone.torch.kernels.cuda.cross_entropy import losses

        return losses(logits, target.contiguous(), _contiguous(weight), ignore_index, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor]) -> None:
        logits, target, weight, ctx.ignore_index, ctx.reduction = inputs
        _, count, kept = output
        ctx.mark_non_differentiable(*([] if count is None else [count]), kept)
        ctx.save_for_backward(logits, target, weight, count, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from duotone.torch.kernels.cuda.cross_entropy import write_gradient

        logits, target, weight, count, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss = F.cross_entropy(logits.float(), target, weight, None, ctx.ignore_index, None, ctx.reduction)
            return *torch.autograd.grad(loss, logits, grad, create_graph=True), None, None, None, None
        grad_logits = logits.detach() if may_write_over(logits) else torch.empty_like(logits)
        rest = (target.contiguous(), _contiguous(weight), ctx.ignore_index, count, kept)
        write_gradient(grad_logits, grad, logits, *rest)
        # written through addresses
        increment_version(grad_logits)
        return grad_logits, None, None, None, None


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float().contiguous()
