"""Cross-entropy of 16-bit logits in two passes over them: one read forward, one read and one write backward.

    loss = w[t] * (log(sum_j exp(x[j] - m)) - (x[t] - m)), m = max_j x[j]
    gradient[j] = w[t] * (softmax(x)[j] - (j == t))

A program takes a row. It finds the largest logit and the sum of exponentials in one pass, in FP32 (Milakov and
Gimelshein 2018, algorithm 3), and keeps both, 8 bytes, for the gradient, which may be written where the logits are.
Rows that are ignored are not read. A target that is no class makes its row's loss and gradient NaN. Sums of rows are
taken in FP64, in one order. Left out: label smoothing, targets that are probabilities.
"""

# Triton wraps what is passed to a constexpr by itself
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from duotone.torch.kernels.cuda.device import on
from duotone.torch.kernels.cuda.formats import narrow

_MOST_BLOCK = 4096
# of the sums of rows: how many are added at once
_LANES = 1024
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the loss of rows, what its mean was divided by, and what the gradient needs of each row.

    Args:
        logits: BF16 or FP16, `(N, C)`, the classes of a row beside each other; neither may be 0.
        target: integers, `(N)`.
        weight: of classes, FP32, `(C)`; None for ones.
        ignore_index: the target of rows that do not count.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Returns:
        FP32: the loss, `()` or `(N)`; the sum of the weights of rows that count, `()`, for a mean; `(N, 2)`.
    """
    rows, classes = logits.shape
    each = logits.new_empty((2, rows), dtype=torch.float32)
    kept = logits.new_empty((rows, 2), dtype=torch.float32)
    with on(logits.device):
        rows_kernel[(rows,)](
            logits, target, weight, each, kept, rows, logits.stride(0), classes, ignore_index, **options_of(classes)
        )
        if reduction == "none":
            return each[0], None, kept
        sums = logits.new_empty(2, dtype=torch.float32)
        reduce_kernel[(1,)](
            each, sums, rows, IS_MEAN=reduction == "mean", LANES=_LANES, num_warps=4, enable_fp_fusion=False
        )
    loss, count = sums.unbind()
    return loss, count if reduction == "mean" else None, kept


def write_gradient(
    out: Tensor,
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    count: Tensor | None,
    kept: Tensor,
) -> None:
    """Write the gradient of logits.

    Args:
        out: where to, as the logits, or the logits themselves.
        grad: of the loss, FP32, `()` or `(N)`.
        logits: as in `losses`.
        target: as there.
        weight: as there.
        ignore_index: as there.
        count: as it was returned there.
        kept: as it was returned there.
    """
    rows, classes = logits.shape
    # then a thread moves its logits and their gradients in one access each
    is_beside = (out.data_ptr() - logits.data_ptr()) % 16 == 0 and (out.stride(0) - logits.stride(0)) % 8 == 0
    with on(logits.device):
        gradient_kernel[(rows,)](
            out,
            grad,
            logits,
            target,
            weight,
            count,
            kept,
            out.stride(0),
            logits.stride(0),
            grad.stride(0) if grad.dim() else 0,
            classes,
            ignore_index,
            IS_BESIDE=is_beside,
            IS_INTERPRETED=not logits.is_cuda,
            **options_of(classes),
        )


def options_of(classes: int) -> dict[str, Any]:
    """Return how many logits a program takes at once, and on how many threads: 16 each."""
    block = min(_MOST_BLOCK, max(512, triton.next_power_of_2(classes)))
    return {"BLOCK": block, "num_warps": block // 512, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["rows", "stride", "classes", "ignore_index"])
def rows_kernel(logits, target, weight, each, kept, rows, stride, classes, ignore_index, BLOCK: tl.constexpr):
    """Write a row's loss and weight into `each`, its largest logit and the logarithm of its sum into `kept`."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(target + row).to(tl.int64)
    loss = 0.0
    share = 0.0
    if place != ignore_index:
        first, lead = _aligned(logits + row * stride)
        end = lead + classes
        most, total = float("-inf"), 0.0
        start = 0
        if lead > 0:
            most, total = _with_tile(most, total, first, 0, lead, end, BLOCK)
            start = BLOCK
        for whole in range(start, end - BLOCK + 1, BLOCK):
            most, total = _with_tile(most, total, first, whole, None, None, BLOCK)
        rest = start + tl.maximum(end - start, 0) // BLOCK * BLOCK
        if rest < end:
            most, total = _with_tile(most, total, first, rest, lead, end, BLOCK)
        is_class = (place >= 0) & (place < classes)
        chosen = tl.load(logits + row * stride + place, mask=is_class, other=float("nan")).to(tl.float32)
        share = _share(weight, place, is_class)
        log_total = tl.log(total)
        loss = share * (log_total - (chosen - most))
        tl.store(kept + row * 2, most)
        tl.store(kept + row * 2 + 1, log_total)
    tl.store(each + row, loss)
    tl.store(each + rows + row, share)


@triton.jit(do_not_specialize=["rows"])
def reduce_kernel(each, sums, rows, IS_MEAN: tl.constexpr, LANES: tl.constexpr):
    """Write the sum of the losses of rows, or their mean, and the sum of their weights."""
    lanes = tl.arange(0, LANES)
    loss = tl.zeros((LANES,), tl.float64)
    count = tl.zeros((LANES,), tl.float64)
    for start in range(0, rows, LANES):
        mask = start + lanes < rows
        loss += tl.load(each + start + lanes, mask=mask, other=0.0).to(tl.float64)
        count += tl.load(each + rows + start + lanes, mask=mask, other=0.0).to(tl.float64)
    total = tl.sum(loss, axis=0)
    weights = tl.sum(count, axis=0)
    if IS_MEAN:
        total = total / weights
    tl.store(sums, total.to(tl.float32))
    tl.store(sums + 1, weights.to(tl.float32))


@triton.jit(do_not_specialize=["out_stride", "stride", "grad_stride", "classes", "ignore_index"])
def gradient_kernel(
    out,
    grad,
    logits,
    target,
    weight,
    count,
    kept,
    out_stride,
    stride,
    grad_stride,
    classes,
    ignore_index,
    IS_BESIDE: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of a row of logits, which may lie where the logits do."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(target + row).to(tl.int64)
    is_ignored = place == ignore_index
    first, lead = _aligned(logits + row * stride)
    first_out = out + row * out_stride - lead
    if IS_BESIDE:
        first_out = tl.multiple_of(first_out, 16)
    end = lead + classes
    most, log_total, scale = 0.0, 0.0, 0.0
    if not is_ignored:
        most = tl.load(kept + row * 2)
        log_total = tl.load(kept + row * 2 + 1)
        scale = tl.load(grad + row * grad_stride) * _share(weight, place, (place >= 0) & (place < classes))
        if count is not None:
            scale = scale / tl.load(count)
    row_numbers = (most, log_total, scale, place + lead)
    start = 0
    if lead > 0:
        _write_tile(first_out, first, 0, lead, end, row_numbers, is_ignored, IS_INTERPRETED, BLOCK)
        start = BLOCK
    for whole in range(start, end - BLOCK + 1, BLOCK):
        _write_tile(first_out, first, whole, None, None, row_numbers, is_ignored, IS_INTERPRETED, BLOCK)
    rest = start + tl.maximum(end - start, 0) // BLOCK * BLOCK
    if rest < end:
        _write_tile(first_out, first, rest, lead, end, row_numbers, is_ignored, IS_INTERPRETED, BLOCK)


@triton.jit
def _aligned(row):
    """Return the last multiple of 16 up to the address of a row, and how many 16-bit numbers lie between."""
    lead = (row.to(tl.int64) % 16 // 2).to(tl.int32)
    return tl.multiple_of(row - lead, 16), lead


@triton.jit
def _with_tile(most, total, first, start, lead, end, BLOCK: tl.constexpr):
    """Return the largest logit and the sum of exponentials with those of a tile: all of it if `end` is None."""
    offsets = start + tl.arange(0, BLOCK)
    if end is None:
        x = tl.load(first + offsets).to(tl.float32)
    else:
        x = tl.load(first + offsets, mask=(offsets >= lead) & (offsets < end), other=float("-inf")).to(tl.float32)
    larger = tl.maximum(most, tl.max(x, axis=0))
    # where all are -Inf so far, there is nothing to subtract
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, total * tl.exp(most - shift) + tl.sum(tl.exp(x - shift), axis=0)


@triton.jit
def _write_tile(
    out, first, start, lead, end, row_numbers, is_ignored, IS_INTERPRETED: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the gradient of a tile: of all of it if `end` is None."""
    most, log_total, scale, place = row_numbers
    offsets = start + tl.arange(0, BLOCK)
    mask = None
    if end is not None:
        mask = (offsets >= lead) & (offsets < end)
    gradient = tl.zeros((BLOCK,), tl.float32)
    if not is_ignored:
        if mask is None:
            x = tl.load(first + offsets).to(tl.float32)
        else:
            x = tl.load(first + offsets, mask=mask, other=0.0).to(tl.float32)
        probability = tl.exp(x - most - log_total)
        gradient = tl.where(offsets == place, probability - 1.0, probability) * scale
    tl.store(out + offsets, narrow(gradient, out.dtype.element_ty, IS_INTERPRETED), mask=mask)


@triton.jit
def _share(weight, place, is_class):
    """Return the weight of a target's class, NaN where it is none."""
    if weight is None:
        share = tl.where(is_class, 1.0, float("nan"))
    else:
        share = tl.load(weight + place, mask=is_class, other=float("nan"))
    return share
