"""The kernel of averages: weight, tail and average in, average out, one pass over all that is stored alike.

A program takes a quarter of a chunk, as in `elements`. It writes nothing if `skipped`.
"""

# Triton wraps what is passed to a constexpr by itself
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from duotone.torch.kernels import table
from duotone.torch.kernels.cuda.elements import SPANS
from duotone.torch.kernels.cuda.memory import read, read_master, write_float32
from duotone.torch.kernels.reference import CHUNK

_SPAN = tl.constexpr(CHUNK // SPANS)
_COLUMNS = tl.constexpr(table.COLUMNS)
_WEIGHT = tl.constexpr(table.WEIGHT)
_TAIL = tl.constexpr(table.TAIL)
_AVERAGE = tl.constexpr(table.MOMENT)
_NUMEL = tl.constexpr(table.NUMEL)


@triton.jit(do_not_specialize=["share", "skipped"])
def average_kernel(
    parameters,
    chunks,
    share,
    skipped,
    WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Move the averages of the part `program_id(1)` of the chunk `program_id(0)` towards the masters."""
    if tl.load(skipped) == 0:
        chunk = chunks + tl.program_id(0).to(tl.int64) * 2
        row = parameters + tl.load(chunk) * _COLUMNS
        first = tl.multiple_of(tl.load(chunk + 1) + tl.program_id(1) * _SPAN, _SPAN)
        addresses = (tl.load(row + _WEIGHT), tl.load(row + _TAIL), tl.load(row + _AVERAGE))
        part = tl.load(share)
        end = tl.minimum(first + _SPAN, tl.load(row + _NUMEL))
        for start in range(first, end - TILE + 1, TILE):
            _average_tile(addresses, start, None, part, WEIGHT, KIND, TILE, ALIGNED)
        rest = first + tl.maximum(end - first, 0) // TILE * TILE
        if rest < end:
            _average_tile(addresses, rest, end, part, WEIGHT, KIND, TILE, ALIGNED)


@triton.jit
def _average_tile(
    addresses, start, end, share, WEIGHT: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Move the averages of a tile: all of it if `end` is None."""
    weight, tail, address = addresses
    offsets = start + tl.arange(0, TILE)
    mask = None if end is None else offsets < end
    master = read_master(weight, tail, offsets, mask, WEIGHT, KIND, ALIGNED)
    average = read(address, offsets, mask, "float32", ALIGNED)
    moved = tl.where(share == 1.0, master, average + (master - average) * share)
    write_float32(address, offsets, mask, moved, ALIGNED)
