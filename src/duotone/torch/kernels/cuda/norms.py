"""LayerNorm and RMSNorm of 16-bit rows with FP32 weights: `y = round16((x - mean) * rstd * weight + bias)`.

FP32 inside, statistics too; RMSNorm has a mean of 0. Forward reads and writes a row once and keeps its mean and `rstd`.
Backward reads rows of data and gradient once and writes the gradient once; programs add up those of weight and bias
over the rows they take, and the sums of programs are added afterwards, in one order. A program holds a whole row in
registers. Left out: rows of more than 8,192 numbers, weights in 16 bits.
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

MOST_WIDTH = 8192
# that share the rows of a backward pass
_PROGRAMS = 512


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, is_rms: bool
) -> tuple[Tensor, Tensor]:
    """Return normalized rows, and the mean and `rstd` of each.

    Args:
        x: BF16 or FP16, `(N, K)`, contiguous; K at most `MOST_WIDTH`, neither 0.
        weight: FP32, `(K)`; None for ones.
        bias: likewise; None for zeros.
        eps: is added to the variance, of RMSNorm to the mean of squares.
        is_rms: RMSNorm, which subtracts no mean.

    Returns:
        As `x`; FP32, `(N, 2)`.
    """
    y = torch.empty_like(x)
    kept = x.new_empty((len(x), 2), dtype=torch.float32)
    with on(x.device):
        normalize_kernel[(len(x),)](x, weight, bias, y, kept, eps, IS_RMS=is_rms, **options_of(x, y))
    return y, kept


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, kept: Tensor, wanted: tuple[bool, bool, bool], *, is_rms: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows, weight and bias.

    Args:
        grad: of what was returned, as `x`.
        x: as in `normalize`.
        weight: as there.
        kept: as it was returned there.
        wanted: which are to be computed.
        is_rms: as there.

    Returns:
        As `x`; FP32, `(K)` each. None where it is not wanted.
    """
    programs = min(len(x), _PROGRAMS)
    of_x = torch.empty_like(x) if wanted[0] else None
    parts = [x.new_empty((programs, x.shape[1]), dtype=torch.float32) if each else None for each in wanted[1:]]
    with on(x.device):
        gradients_kernel[(programs,)](
            grad, x, weight, kept, of_x, *parts, len(x), programs, IS_RMS=is_rms, **options_of(grad, x)
        )
    of_weight, of_bias = (None if part is None else part.sum(0) for part in parts)
    return of_x, of_weight, of_bias


def options_of(x: Tensor, other: Tensor) -> dict[str, Any]:
    """Return what kernels are compiled for, with 16 numbers of a row for each thread at most."""
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    is_aligned = width % 8 == 0 and x.data_ptr() % 16 == 0 and other.data_ptr() % 16 == 0
    return {
        "WIDTH": width,
        "BLOCK": block,
        "ALIGNED": is_aligned,
        "IS_INTERPRETED": not x.is_cuda,
        "num_warps": max(1, min(16, block // 512)),
        "enable_fp_fusion": False,
    }


@triton.jit
def normalize_kernel(
    x,
    weight,
    bias,
    y,
    kept,
    eps,
    IS_RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Write a normalized row, its mean and `rstd`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    value = tl.load(_row(x, row, WIDTH, ALIGNED) + columns, mask=mask, other=0.0).to(tl.float32)
    mean = 0.0
    if not IS_RMS:
        mean = tl.sum(value, axis=0) / WIDTH
        value = tl.where(mask, value - mean, 0.0)
        tl.store(kept + row * 2, mean)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / WIDTH + eps)
    tl.store(kept + row * 2 + 1, rstd)
    value = value * rstd
    if weight is not None:
        value = value * tl.load(weight + columns, mask=mask, other=0.0)
    if bias is not None:
        value = value + tl.load(bias + columns, mask=mask, other=0.0)
    tl.store(_row(y, row, WIDTH, ALIGNED) + columns, narrow(value, y.dtype.element_ty, IS_INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["rows", "programs"])
def gradients_kernel(
    grad,
    x,
    weight,
    kept,
    of_x,
    of_weight,
    of_bias,
    rows,
    programs,
    IS_RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Write the gradient of every row that is this program's, and what they give to those of weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    weight_sums = tl.zeros((BLOCK,), tl.float32)
    bias_sums = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, programs):
        value = tl.load(_row(x, row, WIDTH, ALIGNED) + columns, mask=mask, other=0.0).to(tl.float32)
        of_y = tl.load(_row(grad, row, WIDTH, ALIGNED) + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(kept + row * 2 + 1)
        if not IS_RMS:
            value = tl.where(mask, value - tl.load(kept + row * 2), 0.0)
        unit = value * rstd
        if of_weight is not None:
            weight_sums += of_y * unit
        if of_bias is not None:
            bias_sums += of_y
        if of_x is not None:
            of_unit = of_y
            if weight is not None:
                of_unit = of_y * tl.load(weight + columns, mask=mask, other=0.0)
            along = tl.sum(of_unit * unit, axis=0) / WIDTH
            change = of_unit - unit * along
            if not IS_RMS:
                change = change - tl.sum(of_unit, axis=0) / WIDTH
            result = narrow(change * rstd, of_x.dtype.element_ty, IS_INTERPRETED)
            tl.store(_row(of_x, row, WIDTH, ALIGNED) + columns, result, mask=mask)
    place = program * WIDTH + columns
    if of_weight is not None:
        tl.store(of_weight + place, weight_sums, mask=mask)
    if of_bias is not None:
        tl.store(of_bias + place, bias_sums, mask=mask)


@triton.jit
def _row(start, row, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    address = start + row * WIDTH
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address
