"""Cross-entropy of 16-bit logits as an FP32 loss, without FP32 logits: `loss = mean(w[t] * (logsumexp(x) - x[t]))`.

A few rows at a time are widened, so that on a CPU they stay in its cache, and go through torch's own log-softmax and
loss; the rows' losses are then added up by torch's own kernel. On a CPU the loss has the bits of
`F.cross_entropy(logits.float(), ...)`, and the gradient is that one rounded once. Kept for the backward pass are the
logits in their 16 bits and the targets; log-probabilities are computed again, and the gradient is written where the
logits are if nobody else can reach them. On CUDA `fused_cross_entropy` does the same in two kernels. Run on widened
operands instead are FP32 and small logits, label smoothing, targets that are probabilities, `torch.compile` (it fuses
the widening itself) and `torch.func`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from duotone.torch.casting.float32_inside import fused_cross_entropy
from duotone.torch.casting.float32_inside.autograd_function import apply, is_eager
from duotone.torch.internals.dispatch import log_softmax_backward
from duotone.torch.internals.sharing import may_write_over

_NARROW = (torch.bfloat16, torch.float16)
# logits widened at a time: on a CPU 1 MiB of FP32 for each core, its second-level cache; elsewhere what fills a device
_ELEMENTS_OF_A_THREAD = 2**18
_ELEMENTS = 2**24
_VECTOR = 64
# up to 4 MiB of FP32, computing log-probabilities twice costs more than keeping them
_SMALL = 2**20
# torch's codes of reductions
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


class _ChunkedCrossEntropy(Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
    ) -> tuple[Tensor, Tensor | None]:
        losses = logits.new_empty(target.shape, dtype=torch.float32)
        for part, piece in _chunks(logits):
            probabilities = F.log_softmax(logits[part].float(), 1)
            losses[piece] = F.nll_loss(probabilities, target[piece], weight, None, ignore_index, None, "none")
        if reduction == "none":
            return losses, None
        total = _sum(losses, target, ignore_index)
        if reduction == "sum":
            return total, None
        if weight is None:
            count = (target != ignore_index).sum().float()
        else:
            of_rows = weight[target.where(target != ignore_index, 0)]
            count = _sum(of_rows, target, ignore_index)
        return total / count, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        logits, target, weight, ctx.ignore_index, ctx.reduction = inputs
        count = output[1]
        if count is not None:
            ctx.mark_non_differentiable(count)
        ctx.save_for_backward(logits, target, weight, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, target, weight, count = ctx.saved_tensors
        # a second derivative needs a graph, which writing into parts does not leave
        if torch.is_grad_enabled():
            loss = F.cross_entropy(logits.float(), target, weight, None, ctx.ignore_index, None, ctx.reduction)
            return *torch.autograd.grad(loss, logits, grad, create_graph=True), None, None, None, None
        grad_logits = logits.detach() if may_write_over(logits) else torch.empty_like(logits)
        count = grad.new_ones(()) if count is None else count
        code = _REDUCTIONS[ctx.reduction]
        for part, piece in _chunks(logits):
            probabilities = F.log_softmax(logits[part].float(), 1)
            of_rows = grad[piece] if ctx.reduction == "none" else grad
            rest = (weight, code, ctx.ignore_index, count)
            if logits.dim() == 2:
                of_chosen = torch.ops.aten.nll_loss_backward(of_rows, probabilities, target[piece], *rest)
            else:
                of_rows = of_rows.unsqueeze(1) if of_rows.dim() else of_rows
                image, classes = probabilities.unsqueeze(2), target[piece].unsqueeze(1)
                of_chosen = torch.ops.aten.nll_loss2d_backward(of_rows, image, classes, *rest).squeeze(2)
            grad_logits[part] = log_softmax_backward(of_chosen, probabilities, 1, torch.float32)
        return grad_logits, None, None, None, None


def cross_entropy_in_float32(
    func: Callable[..., Any],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Call `F.cross_entropy` with an FP32 result.

    Args:
        func: `F.cross_entropy`; its arguments follow: logits `(C)`, `(N, C)` or `(N, C, d1, ...)` in any dtype.

    Returns:
        The loss, FP32: NaN where an Inf or a NaN is among the logits of a row that counts, and as a mean of no rows.

    Raises:
        IndexError: If a target is not a class.

    >>> logits = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    >>> cross_entropy_in_float32(F.cross_entropy, logits, torch.tensor([0, 1])).dtype
    torch.float32
    """
    if weight is not None and weight.dtype in _NARROW:
        weight = weight.float()
    chunked = (
        input.dtype in _NARROW
        and input.numel() > _SMALL
        and label_smoothing == 0.0
        and size_average is None
        and reduce is None
        and reduction in _REDUCTIONS
        and not target.is_floating_point()
        and target.shape == (input.shape[:1] + input.shape[2:] if input.dim() > 1 else ())
        and is_eager()
    )
    if not chunked:
        wide = [x.float() if x.dtype in _NARROW else x for x in (input, target)]
        return func(*wide, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    # (N, C) or (N, C, D); a view, but for logits that lie in memory in another order
    logits = input.flatten(2) if input.dim() > 2 else input if input.dim() == 2 else input.unsqueeze(0)
    classes = target.flatten(1) if target.dim() > 1 else target if target.dim() == 1 else target.unsqueeze(0)
    is_fused = fused_cross_entropy.takes(logits, classes)
    function = fused_cross_entropy.FusedCrossEntropy if is_fused else _ChunkedCrossEntropy
    loss, *_ = apply(function, logits, classes, weight, ignore_index, reduction)
    return loss.view(target.shape) if reduction == "none" else loss


def _chunks(logits: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yield indices into the logits, `(N, C)` or `(N, C, D)`, and the same ones into the targets, `(N)` or `(N, D)`."""
    elements = _ELEMENTS_OF_A_THREAD * torch.get_num_threads() if logits.is_cpu else _ELEMENTS
    rows, classes, *inner = logits.shape
    columns = inner[0] if inner else 1
    row_step = max(1, elements // max(1, classes * columns))
    # whole vectors, so that the same columns are left to the end of one as in a single call
    column_step = max(_VECTOR, elements // max(1, classes) // _VECTOR * _VECTOR)
    for row in range(0, rows, row_step):
        some = slice(row, row + row_step)
        if not inner:
            yield (some,), (some,)
        # several rows are taken whole
        for column in range(0, columns if inner else 0, column_step if row_step == 1 else max(1, columns)):
            across = slice(column, column + column_step if row_step == 1 else columns)
            yield (some, slice(None), across), (some, across)


def _sum(of_rows: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    # in the order in which torch adds losses up: as those of one class, each row its own
    marks = torch.where(target == ignore_index, -100, 0)
    return F.nll_loss(-of_rows.unsqueeze(1), marks, reduction="sum")
