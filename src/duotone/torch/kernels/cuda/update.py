"""The update kernel: gradient, weight, tail and moments in, weight, tail and moments out, one pass over all parameters.

A program takes a quarter of a chunk and walks it in tiles, whole ones without a mask. It writes nothing if `found_inf`.
"""

# Triton wraps what is passed to a constexpr by itself
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from duotone.torch.kernels import table
from duotone.torch.kernels.cuda.coefficients import WORDS, read_coefficients, read_draws
from duotone.torch.kernels.cuda.memory import read, read_master, write_master, write_moment
from duotone.torch.kernels.cuda.rules import adamw_rule, lion_rule, sgd_rule
from duotone.torch.kernels.reference import CHUNK

# programs per chunk: enough to occupy a device with a small model, few enough to pay for reading the table
SPANS = 4

_SPAN = tl.constexpr(CHUNK // SPANS)
_WORDS = tl.constexpr(WORDS)
_COLUMNS = tl.constexpr(table.GROUP + 1)
_GRAD = tl.constexpr(table.GRAD)
_WEIGHT = tl.constexpr(table.WEIGHT)
_TAIL = tl.constexpr(table.TAIL)
_MOMENT1 = tl.constexpr(table.MOMENT1)
_MOMENT2 = tl.constexpr(table.MOMENT2)
_NUMEL = tl.constexpr(table.NUMEL)


def tile_of(form: table.Form) -> int:
    """Return how many elements 128 threads take at once: 16 bytes a thread of the widest storage that is written.

    Then all accesses of a thread are of the same elements, and nothing moves between threads.
    """
    return 512 if "float32" in (form.weight, form.moments) else 1024


@triton.jit(do_not_specialize=["found_inf"])
def update_kernel(
    parameters,
    chunks,
    coefficients,
    found_inf,
    RULE: tl.constexpr,
    WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTS: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update the part `program_id(1)` of the chunk `program_id(0)` of parameters of one form."""
    if tl.load(found_inf) == 0:
        chunk = chunks + tl.program_id(0).to(tl.int64) * 2
        number = tl.load(chunk)
        # chunks begin at multiples of their length, in elements
        first = tl.multiple_of(tl.load(chunk + 1) + tl.program_id(1) * _SPAN, _SPAN)
        row = parameters + number * _COLUMNS
        words = coefficients + number * _WORDS
        addresses = (
            tl.load(row + _GRAD),
            tl.load(row + _WEIGHT),
            tl.load(row + _TAIL),
            tl.load(row + _MOMENT1),
            tl.load(row + _MOMENT2),
        )
        c = read_coefficients(words)
        draws = read_draws(words)
        end = tl.minimum(first + _SPAN, tl.load(row + _NUMEL))
        for start in range(first, end - TILE + 1, TILE):
            _update_tile(addresses, start, None, c, draws, RULE, WEIGHT, KIND, GRAD, MOMENTS, TILE, ALIGNED)
        rest = first + tl.maximum(end - first, 0) // TILE * TILE
        if rest < end:
            _update_tile(addresses, rest, end, c, draws, RULE, WEIGHT, KIND, GRAD, MOMENTS, TILE, ALIGNED)


@triton.jit
def _update_tile(
    addresses,
    start,
    end,
    c,
    draws,
    RULE: tl.constexpr,
    WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTS: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update a tile: all of it if `end` is None."""
    grad_address, weight, tail, moment1_address, moment2_address = addresses
    offsets = start + tl.arange(0, TILE)
    mask = None if end is None else offsets < end
    grad = read(grad_address, offsets, mask, GRAD, ALIGNED) * c[0]
    master = read_master(weight, tail, offsets, mask, WEIGHT, KIND, ALIGNED)
    HAS_MOMENTS: tl.constexpr = MOMENTS != "none"
    moment1 = read(moment1_address, offsets, mask, MOMENTS, ALIGNED) if HAS_MOMENTS else grad
    if RULE == "adamw":
        moment2 = read(moment2_address, offsets, mask, MOMENTS, ALIGNED)
        master, moment1, moment2 = adamw_rule(grad, master, moment1, moment2, c)
        write_moment(moment2_address, start, offsets, mask, moment2, draws, 2, MOMENTS, TILE, ALIGNED)
    elif RULE == "sgd":
        master, moment1 = sgd_rule(grad, master, moment1, c, HAS_MOMENTS)
    else:
        master, moment1 = lion_rule(grad, master, moment1, c)
    if HAS_MOMENTS:
        write_moment(moment1_address, start, offsets, mask, moment1, draws, 1, MOMENTS, TILE, ALIGNED)
    write_master(weight, tail, start, offsets, mask, master, draws, WEIGHT, KIND, TILE, ALIGNED)
