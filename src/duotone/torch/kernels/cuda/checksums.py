"""Checksums of weights on the device, a program's part of a chunk at once: compared before its update, taken after.

The second reading of the weights is of the cache. The bits are those of `kernels.checksums`.
"""

# Triton wraps what is passed to a constexpr by itself
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from duotone.torch.kernels import checksums
from duotone.torch.kernels.cuda.memory import load, store

_CELL = tl.constexpr(checksums.CELL)
_FACTOR = tl.constexpr(checksums.FACTOR)


# cells at once: as many as leave a thread its registers, and enough for few waits
_CELLS = tl.constexpr(8)
_PART = tl.constexpr(8 * checksums.CELL)


@triton.jit
def follow_changes(weight, tail, known, numel, first, end, seen, mark, ALIGNED: tl.constexpr):
    """Set tails to 0 in those cells between two elements whose weights were changed since the last step.

    Args:
        weight: the address of a parameter's weights.
        tail: of their tails.
        known: of their checksums; 0 if there are none.
        numel: how many weights the parameter has.
        first: the first element, of a cell.
        end: behind the last one, of a cell too or of the parameter.
        seen: where it is marked that there was a change.
        mark: with which bit.
    """
    if known != 0:
        place = known.to(tl.pointer_type(tl.int32))
        for start in range(first, end, _PART):
            cells, is_there = _cells(start, end)
            before = tl.load(place + cells, mask=is_there, other=0)
            changed = (before != 0) & (before != _sums(weight, start, end, ALIGNED))
            if tl.max(changed.to(tl.int32), axis=0) != 0:
                offsets = _offsets(start)
                store(tail, offsets, changed[:, None] & (offsets < end), tl.zeros_like(offsets), tl.int16, False)
                tl.atomic_or(seen, mark)
                tl.atomic_or(place + (numel + _CELL - 1) // _CELL, mark)
                # the tails are read by other threads than wrote them
                tl.debug_barrier()


@triton.jit
def write_checksums(weight, known, first, end, ALIGNED: tl.constexpr):
    """Write the checksums of the cells between two elements; arguments are those of `follow_changes`."""
    if known != 0:
        # the weights were written by other threads than read them
        tl.debug_barrier()
        for start in range(first, end, _PART):
            cells, is_there = _cells(start, end)
            sums = _sums(weight, start, end, ALIGNED)
            tl.store(known.to(tl.pointer_type(tl.int32)) + cells, sums, mask=is_there)


@triton.jit
def _cells(start, end):
    """Return the numbers of a part's cells, and whether there are such."""
    cells = start // _CELL + tl.arange(0, _CELLS)
    return cells, cells * _CELL < end


@triton.jit
def _offsets(start):
    return start + tl.arange(0, _CELLS)[:, None] * _CELL + tl.arange(0, _CELL)[None, :]


@triton.jit
def _sums(weight, start, end, ALIGNED: tl.constexpr):
    offsets = _offsets(start)
    # whole parts without a mask, so that a thread moves its elements in one access
    if end - start >= _PART:
        bits = load(weight, offsets, None, tl.int16, ALIGNED)
    else:
        bits = load(weight, offsets, offsets < end, tl.int16, ALIGNED)
    factors = ((2 * tl.arange(0, _CELL) + 1) * _FACTOR).to(tl.int16).to(tl.int32)
    sums = tl.sum(bits.to(tl.int32) * factors[None, :], axis=1)
    return tl.where(sums == 0, 1, sums)
