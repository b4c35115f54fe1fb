"""Averages on the CPU: weight, tail and average in, average out, over the chunks of all that is stored alike."""

from typing import Any

from duotone.torch.kernels.cpu import memory
from duotone.torch.kernels.cpu.formats import f32, master_reader
from duotone.torch.kernels.cpu.memory import compiled, read_f32, read_i64
from duotone.torch.kernels.cpu.pieces import COLUMNS, over_pieces, part_of
from duotone.torch.kernels.table import MOMENT, TAIL, WEIGHT, Formats

# word of a job behind those of pieces
SHARE = COLUMNS + 1

_read_average, _write_average = memory.reader("f32", memory.MOMENT), memory.writer("f32", memory.MOMENT)


def kernel(formats: Formats) -> Any:
    """Return the kernel for weights in a format."""
    read_master = master_reader(formats.weight)

    @compiled
    def chunk(job, number, share):
        _, operand, start, stop = part_of(job, number)
        weight, tail, average = read_i64(operand, WEIGHT), read_i64(operand, TAIL), read_i64(operand, MOMENT)
        # no branch in a loop, so that both become vector instructions
        if share == f32(1.0):
            for i in range(start, stop):
                _write_average(average, i, read_master(weight, tail, i))
        else:
            for i in range(start, stop):
                before = _read_average(average, i)
                _write_average(average, i, before + (read_master(weight, tail, i) - before) * share)

    every_chunk = over_pieces(chunk)

    def run(job):
        every_chunk(job, read_f32(read_i64(job, SHARE), 0))

    return run
