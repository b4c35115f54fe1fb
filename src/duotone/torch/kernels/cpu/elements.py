"""The updates on the CPU: one kernel per update and formats, over the chunks of all of its parameters.

A kernel takes pieces of work from a common counter, so that it may run on any number of threads, and reads a
parameter's coefficients, which `coefficients` has computed before. The arithmetic of an element is in `updates`.
"""

from importlib import import_module
from typing import Any

from duotone.torch.kernels.checksums import CELL
from duotone.torch.kernels.cpu import memory
from duotone.torch.kernels.cpu.checksums import factor_table, fill_factors, tile_functions
from duotone.torch.kernels.cpu.formats import f32, i64, master_reader, master_writer, moment_writer, value_reader
from duotone.torch.kernels.cpu.memory import compiled, read_f32, read_i64, tuple_reader
from duotone.torch.kernels.cpu.pieces import COLUMNS, over_pieces, part_of
from duotone.torch.kernels.cpu.random import TILE, fill_tile
from duotone.torch.kernels.reference import CHUNK
from duotone.torch.kernels.slots import MAX_MOMENTS
from duotone.torch.kernels.table import GRAD, MOMENT, NUMBER, TAIL, WEIGHT, Formats
from duotone.torch.kernels.updates.definition import Update

# words of a job behind those of pieces
COEFFICIENT_TABLE, DRAWS, SEEN, MARK = range(COLUMNS + 1, COLUMNS + 5)

_read_random = memory.reader("u16", memory.RANDOM)
# a tile of random bits for the weight and for each moment
_random_tiles = memory.stack((1 + MAX_MOMENTS) * 2 * TILE)


def kernel(definition: Update, formats: Formats) -> Any:
    """Return the kernel of an update for operands in some formats."""
    elements = _elements(definition, formats)
    coefficient_columns = 1 + len(definition.coefficient_names._fields)
    weight_is_random = formats.weight.endswith("+stochastic")
    random1, random2, random3 = [name == "bfloat16" for name in (*formats.moments, "", "", "")[:MAX_MOMENTS]]
    follow_changes, write_checksums = tile_functions(formats.weight)
    # what is read twice, to be compared first, is best a little at a time: what follows it in memory is on its way into
    # the cache meanwhile. Without random bits or checksums there is no reason to stop between
    if formats.weight.endswith("+tail"):
        tile = CELL
    else:
        tile = TILE if weight_is_random or "bfloat16" in formats.moments else CHUNK

    @compiled
    def chunk(job, number, context):
        tiles, factors, seen, mark = context
        row, operand, start, stop = part_of(job, number)
        coefficients = read_i64(job, COEFFICIENT_TABLE) + 4 * coefficient_columns * row
        draw = read_i64(job, DRAWS) + 16 * row
        step, seed, index = read_i64(draw, 0), read_i64(draw, 1), read_i64(operand, NUMBER)
        while start < stop:
            end = min(start + tile, stop)
            if weight_is_random:
                fill_tile(tiles, start, end, seed, step, index)
            if random1:
                fill_tile(tiles + 2 * TILE, start, end, seed, step, index | (1 << 30))
            if random2:
                fill_tile(tiles + 4 * TILE, start, end, seed, step, index | (2 << 30))
            if random3:
                fill_tile(tiles + 6 * TILE, start, end, seed, step, index | (3 << 30))
            follow_changes(operand, i64(start), i64(end), factors, seen, mark)
            elements(operand, coefficients, tiles, i64(start), i64(end))
            write_checksums(operand, i64(start), i64(end), factors)
            start = end

    every_chunk = over_pieces(chunk)

    def run(job):
        tiles, factors = _random_tiles(), factor_table()
        fill_factors(factors)
        every_chunk(job, (tiles, factors, read_i64(job, SEEN), read_i64(job, MARK)))

    return run


def _elements(definition: Update, formats: Formats) -> Any:
    """Return a compiled function that updates the elements from one to another."""
    apply = import_module(f"duotone.torch.kernels.cpu.updates.{definition.name}").apply(len(formats.moments))
    names = definition.coefficient_names
    read_coefficients = tuple_reader("f32", len(names._fields), names)
    read_grad = value_reader(formats.grad, memory.GRAD)
    read_master, write_master = master_reader(formats.weight), master_writer(formats.weight)
    (read1, write1), (read2, write2), (read3, write3) = [_moment(formats, number) for number in range(MAX_MOMENTS)]

    @compiled
    def elements(operand, coefficients, random, start, stop):
        grad_address, weight, tail = read_i64(operand, GRAD), read_i64(operand, WEIGHT), read_i64(operand, TAIL)
        moment1, moment2, moment3 = (
            read_i64(operand, MOMENT),
            read_i64(operand, MOMENT + 1),
            read_i64(operand, MOMENT + 2),
        )
        multiplier, c = read_f32(coefficients, 0), read_coefficients(coefficients + 4)
        for i in range(start, stop):
            grad = read_grad(grad_address, i) * multiplier
            moments = read1(moment1, i), read2(moment2, i), read3(moment3, i)
            master, moments = apply(grad, read_master(weight, tail, i), moments, c)
            write1(moment1, i, moments[0], _read_random(random, TILE + i - start))
            write2(moment2, i, moments[1], _read_random(random, 2 * TILE + i - start))
            write3(moment3, i, moments[2], _read_random(random, 3 * TILE + i - start))
            write_master(weight, tail, i, master, _read_random(random, i - start))

    return elements


def _moment(formats: Formats, number: int) -> tuple[Any, Any]:
    """Return how a moment is read and written: as 0 and not at all if there is none of that number."""
    if number < len(formats.moments):
        name, stream = formats.moments[number], memory.MOMENT + number
        return value_reader(name, stream), moment_writer(name, stream)
    return _read_none, _write_none


@compiled
def _read_none(address, index):
    return f32(0.0)


@compiled
def _write_none(address, index, value, random):
    pass
