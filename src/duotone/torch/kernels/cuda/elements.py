"""The update kernel: gradient, weight, tail and moments in, weight, tail and moments out, one pass over all parameters.

A program takes a quarter of a chunk and walks it in tiles, whole ones without a mask. It writes nothing if `found_inf`.
"""

# Triton wraps what is passed to a constexpr by itself, unrolls a static_range, and knows no star in a tuple
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: RUF005

import triton
import triton.language as tl

from duotone.torch.kernels import table
from duotone.torch.kernels.cuda.checksums import follow_changes, write_checksums
from duotone.torch.kernels.cuda.coefficients import (
    FIRST_COEFFICIENT,
    read_coefficients,
    read_draws,
    read_multiplier,
)
from duotone.torch.kernels.cuda.memory import read, read_master, write_master, write_moment
from duotone.torch.kernels.reference import CHUNK

# programs per chunk: enough to occupy a device with a small model, few enough to pay for reading the table
SPANS = 4

_SPAN = tl.constexpr(CHUNK // SPANS)
_FIRST_COEFFICIENT = tl.constexpr(FIRST_COEFFICIENT)
_COLUMNS = tl.constexpr(table.COLUMNS)
_GRAD = tl.constexpr(table.GRAD)
_WEIGHT = tl.constexpr(table.WEIGHT)
_TAIL = tl.constexpr(table.TAIL)
_MOMENT = tl.constexpr(table.MOMENT)
_NUMEL = tl.constexpr(table.NUMEL)
_CHECKSUMS = tl.constexpr(table.CHECKSUMS)


def tile_of(formats: table.Formats) -> int:
    """Return how many elements 128 threads take at once: 16 bytes a thread of the widest storage that is written.

    Then all accesses of a thread are of the same elements, and nothing moves between threads.
    """
    return 512 if "float32" in (formats.weight, *formats.moments) else 1024


@triton.jit(do_not_specialize=["found_inf", "seen", "mark"])
def update_kernel(
    parameters,
    chunks,
    coefficients,
    found_inf,
    seen,
    mark,
    APPLY: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    NAMES: tl.constexpr,
    WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTS: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update the part `program_id(1)` of the chunk `program_id(0)` of parameters in the same formats.

    Weights with a tail that were changed since the last step are their own masters, and `mark` is set in `seen` then.
    `APPLY` is the update's function, `COEFFICIENTS` its `NamedTuple` of coefficients, and `NAMES` the names in it.
    """
    if tl.load(found_inf) == 0:
        chunk = chunks + tl.program_id(0).to(tl.int64) * 2
        number = tl.load(chunk)
        # chunks begin at multiples of their length, in elements
        first = tl.multiple_of(tl.load(chunk + 1) + tl.program_id(1) * _SPAN, _SPAN)
        row = parameters + number * _COLUMNS
        words = coefficients + number * (_FIRST_COEFFICIENT + len(NAMES))
        addresses = (tl.load(row + _GRAD), tl.load(row + _WEIGHT), tl.load(row + _TAIL))
        moments = ()
        for index in tl.static_range(len(MOMENTS)):
            moments = moments + (tl.load(row + _MOMENT + index),)
        multiplier = read_multiplier(words)
        c = read_coefficients(words, COEFFICIENTS, NAMES)
        draws = read_draws(words)
        numel = tl.load(row + _NUMEL)
        end = tl.minimum(first + _SPAN, numel)
        known = tl.load(row + _CHECKSUMS)
        if KIND == "tail":
            follow_changes(addresses[1], addresses[2], known, numel, first, end, seen, mark, ALIGNED)
        for start in range(first, end - TILE + 1, TILE):
            _update_tile(
                addresses, moments, start, None, multiplier, c, draws,
                APPLY, WEIGHT, KIND, GRAD, MOMENTS, TILE, ALIGNED,
            )  # fmt: skip
        rest = first + tl.maximum(end - first, 0) // TILE * TILE
        if rest < end:
            _update_tile(
                addresses, moments, rest, end, multiplier, c, draws,
                APPLY, WEIGHT, KIND, GRAD, MOMENTS, TILE, ALIGNED,
            )  # fmt: skip
        if KIND == "tail":
            write_checksums(addresses[1], known, first, end, ALIGNED)


@triton.jit
def _update_tile(
    addresses,
    moment_addresses,
    start,
    end,
    multiplier,
    c,
    draws,
    APPLY: tl.constexpr,
    WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTS: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update a tile: all of it if `end` is None."""
    grad_address, weight, tail = addresses
    offsets = start + tl.arange(0, TILE)
    mask = None if end is None else offsets < end
    grad = read(grad_address, offsets, mask, GRAD, ALIGNED) * multiplier
    master = read_master(weight, tail, offsets, mask, WEIGHT, KIND, ALIGNED)
    moments = ()
    for index in tl.static_range(len(MOMENTS)):
        moments = moments + (read(moment_addresses[index], offsets, mask, tl.constexpr(MOMENTS[index]), ALIGNED),)
    master, moments = APPLY(grad, master, moments, c)
    for index in tl.static_range(len(MOMENTS)):
        address, moment = moment_addresses[index], moments[index]
        write_moment(
            address, start, offsets, mask, moment, draws, index + 1, tl.constexpr(MOMENTS[index]), TILE, ALIGNED
        )
    write_master(weight, tail, start, offsets, mask, master, draws, WEIGHT, KIND, TILE, ALIGNED)
