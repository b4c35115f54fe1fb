"""Averages on the CPU: weight, tail and average in, average out, over the chunks of all that is stored alike."""

from typing import Any

from duotone.torch.kernels.cpu import memory
from duotone.torch.kernels.cpu.formats import f32, i64, master_reader
from duotone.torch.kernels.cpu.memory import compiled, read_f32, read_i64, take_next
from duotone.torch.kernels.reference import CHUNK
from duotone.torch.kernels.table import MOMENT, NUMEL, TAIL, WEIGHT, Formats

# words of a job
COUNTER, PIECES, PIECE_COUNT, CHUNKS, PARAMETERS, COLUMNS, SHARE = range(7)

_read_average, _write_average = memory.reader("f32", memory.MOMENT), memory.writer("f32", memory.MOMENT)


def kernel(formats: Formats) -> Any:
    """Return the kernel for weights in a format."""
    read_master = master_reader(formats.weight)

    @compiled
    def chunk(operand, start, stop, share):
        weight, tail, average = read_i64(operand, WEIGHT), read_i64(operand, TAIL), read_i64(operand, MOMENT)
        # no branch in a loop, so that both become vector instructions
        if share == f32(1.0):
            for i in range(start, stop):
                _write_average(average, i, read_master(weight, tail, i))
        else:
            for i in range(start, stop):
                before = _read_average(average, i)
                _write_average(average, i, before + (read_master(weight, tail, i) - before) * share)

    def run(job):
        share = read_f32(read_i64(job, SHARE), 0)
        while True:
            piece = take_next(read_i64(job, COUNTER))
            if piece >= read_i64(job, PIECE_COUNT):
                break
            bounds = read_i64(job, PIECES)
            for number in range(read_i64(bounds, piece), read_i64(bounds, piece + 1)):
                row = read_i64(read_i64(job, CHUNKS), 2 * number)
                start = read_i64(read_i64(job, CHUNKS), 2 * number + 1)
                operand = read_i64(job, PARAMETERS) + 8 * read_i64(job, COLUMNS) * row
                chunk(operand, i64(start), i64(min(start + CHUNK, read_i64(operand, NUMEL))), share)

    return run
