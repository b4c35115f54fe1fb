"""Checksums of weights on the CPU, cell by cell: compared before a cell is updated, taken again after.

A cell is in the cache for both, so that weights come from memory once. The bits are those of `kernels.checksums`.
"""

from typing import Any

from duotone.torch.kernels.checksums import CELL, FACTOR
from duotone.torch.kernels.cpu import memory
from duotone.torch.kernels.cpu.formats import i16, i32, i64, u16, u32
from duotone.torch.kernels.cpu.memory import compiled, read_i64, read_u32, set_bits, write_u32
from duotone.torch.kernels.table import CHECKSUMS, NUMEL, TAIL, WEIGHT

_read_weight, _write_tail = memory.reader("u16", memory.WEIGHT), memory.writer("u16", memory.TAIL)
_read_factor, _write_factor = memory.reader("u16", memory.TABLE), memory.writer("u16", memory.TABLE)
# memory for the factors of a cell: LLVM multiplies and adds what it reads in one instruction, but not what it computes
factor_table = memory.stack(2 * CELL)


@compiled
def fill_factors(factors):
    """Write the factors of a cell."""
    for place in range(CELL):
        _write_factor(factors, i64(place), u16(i64(2 * place + 1) * i64(FACTOR)))


@compiled
def sum_of_cell(weight, start, stop, factors):
    """Return the checksum of the cell between two elements."""
    total = i32(0)
    for place in range(stop - start):
        bits, factor = i16(_read_weight(weight, start + place)), i16(_read_factor(factors, place))
        total = i32(total + i32(i32(bits) * i32(factor)))
    if total == i32(0):
        total = i32(1)
    return u32(total)


@compiled
def follow_changes(operand, start, stop, factors, seen, mark):
    """Set the tails to 0 in those cells of a tile whose weights were changed since the last step, and mark that."""
    checksums = read_i64(operand, CHECKSUMS)
    if checksums == 0:
        return
    weight, tail = read_i64(operand, WEIGHT), read_i64(operand, TAIL)
    while start < stop:
        end = min(start + CELL, stop)
        known = read_u32(checksums, start // CELL)
        if known != u32(0) and known != sum_of_cell(weight, i64(start), i64(end), factors):
            for i in range(start, end):
                _write_tail(tail, i64(i), u16(0))
            if seen != 0:
                set_bits(seen, mark)
                set_bits(checksums + 4 * ((read_i64(operand, NUMEL) + CELL - 1) // CELL), mark)
        start = end


@compiled
def write_checksums(operand, start, stop, factors):
    """Write the checksums of the cells of a tile."""
    checksums = read_i64(operand, CHECKSUMS)
    if checksums == 0:
        return
    weight = read_i64(operand, WEIGHT)
    while start < stop:
        end = min(start + CELL, stop)
        write_u32(checksums, start // CELL, sum_of_cell(weight, i64(start), i64(end), factors))
        start = end


@compiled
def _follow_nothing(operand, start, stop, factors, seen, mark):
    pass


@compiled
def _write_nothing(operand, start, stop, factors):
    pass


def tile_functions(weight_format: str) -> tuple[Any, Any]:
    """Return what is called for a tile before and after its update."""
    if weight_format.endswith("+tail"):
        return follow_changes, write_checksums
    return _follow_nothing, _write_nothing
