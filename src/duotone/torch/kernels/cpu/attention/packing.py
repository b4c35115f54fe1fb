"""Operands of attention laid out for `vectors.multiplier`: rows copied, rows in pairs, and pairs of columns turned.

BF16 numbers are moved two at a time, as 32 bits, or put beside each other as such. What is beyond the given rows is
zero, so that tiles need no end of their own.
"""

from typing import Any

from duotone.torch.kernels.cpu import memory
from duotone.torch.kernels.cpu.attention.sizes import PANEL
from duotone.torch.kernels.cpu.formats import i64, u32
from duotone.torch.kernels.cpu.memory import compiled

_read_16, _read_32 = memory.reader("u16", memory.GRAD), memory.reader("u32", memory.GRAD)
_write_32 = memory.writer("u32", memory.WEIGHT)


@compiled
def copy_rows(source, row_bytes, rows, padded, pairs, target):
    """Copy rows of `pairs` times two numbers, one behind the other, up to `padded` rows."""
    for row in range(rows):
        line = i64(source + row * row_bytes)
        for pair in range(pairs):
            _write_32(target, i64(row * pairs + pair), _read_32(line, i64(pair)))
    for place in range(rows * pairs, padded * pairs):
        _write_32(target, i64(place), u32(0))


@compiled
def turn(source, row_bytes, rows, pairs, target):
    """Lay out keys for products whose columns they are: `[panels][pairs][PANEL][2]`."""
    for first in range(0, rows, PANEL):
        panel = i64(target + first * pairs * 4)
        count = min(PANEL, rows - first)
        for key in range(count):
            line = i64(source + (first + key) * row_bytes)
            for pair in range(pairs):
                _write_32(panel, i64(pair * PANEL + key), _read_32(line, i64(pair)))
        for key in range(count, PANEL):
            for pair in range(pairs):
                _write_32(panel, i64(pair * PANEL + key), u32(0))


def pairer(columns: int) -> Any:
    """Return a compiled function that lays out rows to be summed over: `[panels][row pairs][columns][2]`."""

    @compiled
    def pair_up(source, row_bytes, rows, padded, width, target):
        for first in range(0, width, columns):
            panel = i64(target + first * padded * 2)
            for pair in range(padded // 2):
                line = i64(source + 2 * pair * row_bytes + 2 * first)
                into = i64(panel + pair * columns * 4)
                if 2 * pair + 1 < rows:
                    below = i64(line + row_bytes)
                    for column in range(columns):
                        high = u32(u32(_read_16(below, i64(column))) << u32(16))
                        _write_32(into, i64(column), u32(u32(_read_16(line, i64(column))) | high))
                elif 2 * pair < rows:
                    for column in range(columns):
                        _write_32(into, i64(column), u32(_read_16(line, i64(column))))
                else:
                    for column in range(columns):
                        _write_32(into, i64(column), u32(0))

    return pair_up
