"""The sum of squares of all gradients in FP64, in the order of `reference.grad_stats`, and whether any is not finite.

A program sums one chunk: 1024 accumulators take the rows in sequence, then halves are added to halves. Programs leave
their sums at their chunk's number, and sums are summed likewise until one is left.
"""

# Triton wraps what is passed to a constexpr by itself
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from duotone.torch.kernels.cuda.memory import read
from duotone.torch.kernels.reference import CHUNK, LANES, PARTS, ROWS

_CHUNK = tl.constexpr(CHUNK)
_PARTS = tl.constexpr(PARTS)
_ROWS = tl.constexpr(ROWS)
_LANES = tl.constexpr(LANES)
# rows that are loaded ahead of being summed
_AHEAD = tl.constexpr(4)


@triton.jit
def squares_kernel(chunks, sums, FORMAT: tl.constexpr, WIDE: tl.constexpr):
    """Write the sum of squares of one chunk of a gradient to the chunk's number among all sums.

    `WIDE` says that addresses are multiples of 16 and lengths multiples of 8.
    """
    chunk = chunks + tl.program_id(0).to(tl.int64) * 3
    address, length, number = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    # a mask that holds or not for eight elements at once keeps accesses wide
    GROUP: tl.constexpr = 8 if WIDE else 1
    accumulators = tl.zeros((_PARTS, _LANES), tl.float64)
    for first in range(0, _ROWS, _AHEAD):
        for row in tl.static_range(_AHEAD):
            offsets = _offsets(first + row)
            value = read(address, offsets, offsets // GROUP < length // GROUP, FORMAT, WIDE).to(tl.float64)
            accumulators += value * value
    tl.store(sums + number, _by_halves(accumulators))


@triton.jit(do_not_specialize=["count"])
def sums_kernel(values, count, sums):
    """Write the sum of one chunk of FP64 values."""
    number = tl.program_id(0).to(tl.int64)
    tl.store(sums + number, _sum(values + number * _CHUNK, count - number * _CHUNK))


@triton.jit(do_not_specialize=["count", "inverse_scale", "total", "found_inf"])
def total_kernel(values, count, inverse_scale, total, found_inf):
    """Write the sum of up to one chunk of FP64 values, times `inverse_scale` squared, and whether it is not finite."""
    value = _sum(values, count)
    inverse = tl.load(inverse_scale).to(tl.float64)
    tl.store(total, value * (inverse * inverse))
    # a NaN is below nothing
    tl.store(found_inf, (tl.abs(value) < float("inf")) == 0)


@triton.jit
def _sum(values, length):
    accumulators = tl.zeros((_PARTS, _LANES), tl.float64)
    for row in range(0, _ROWS):
        offsets = _offsets(row)
        accumulators += tl.load(values + offsets, mask=offsets < length, other=0.0)
    return _by_halves(accumulators)


@triton.jit
def _offsets(row):
    parts = tl.arange(0, _PARTS)[:, None] * (_ROWS * _LANES)
    return parts + row * _LANES + tl.arange(0, _LANES)[None, :]


@triton.jit
def _by_halves(sums):
    """Return the sum of a power of two of values: one half plus the other, down to one."""
    sums = _pairs(sums, _PARTS * _LANES)
    sums = _pairs(sums, 512)
    sums = _pairs(sums, 256)
    sums = _pairs(sums, 128)
    sums = _pairs(sums, 64)
    sums = _pairs(sums, 32)
    sums = _pairs(sums, 16)
    sums = _pairs(sums, 8)
    sums = _pairs(sums, 4)
    # the sum of two is the same in either order
    return tl.sum(sums, axis=0)


@triton.jit
def _pairs(sums, COUNT: tl.constexpr):
    return tl.sum(tl.reshape(sums, (2, COUNT // 2)), axis=0)
