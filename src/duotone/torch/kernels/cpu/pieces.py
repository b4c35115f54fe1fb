"""How kernels share chunks of tensors among threads: pieces of work, each some chunks, from a common counter."""

from typing import Any

from duotone.torch.kernels.cpu.formats import i64
from duotone.torch.kernels.cpu.memory import compiled, read_i64, take_next
from duotone.torch.kernels.reference import CHUNK
from duotone.torch.kernels.table import NUMEL

# the first words of a job; a kernel's own come after CHUNKS, or after COLUMNS if its chunks are those of `table.Table`
COUNTER, PIECES, PIECE_COUNT, CHUNKS, PARAMETERS, COLUMNS = range(6)


def over_pieces(chunk: Any) -> Any:
    """Return a compiled function `(job, context)` that calls `chunk(job, number, context)` for the chunks it takes."""

    @compiled
    def run(job, context):
        while True:
            piece = take_next(read_i64(job, COUNTER))
            if piece >= read_i64(job, PIECE_COUNT):
                break
            bounds = read_i64(job, PIECES)
            for number in range(read_i64(bounds, piece), read_i64(bounds, piece + 1)):
                chunk(job, number, context)

    return run


@compiled
def part_of(job, number):
    """Return the row of parameters that a chunk of `table.Table` is of, its address, and the chunk's elements."""
    row = read_i64(read_i64(job, CHUNKS), 2 * number)
    start = read_i64(read_i64(job, CHUNKS), 2 * number + 1)
    operand = read_i64(job, PARAMETERS) + 8 * read_i64(job, COLUMNS) * row
    return row, operand, i64(start), i64(min(start + CHUNK, read_i64(operand, NUMEL)))
