"""The job of attention's kernels: a table of 64-bit words, and where a thread finds its memory.

Tensors are `(batch, heads, rows, width)`, the last dimension dense; the words of one are its address and its strides
in bytes. A part of the work is one head of keys with its queries (backward) or a slice of them (forward).
"""

from typing import Any

from duotone.torch.kernels.cpu.formats import i64
from duotone.torch.kernels.cpu.memory import compiled, read_i64

# words: counters that threads take parts and memory from, sizes, and numbers
(
    PARTS_TAKEN, THREADS, PARTS, SLICES, MEMORY, MEMORY_BYTES,
    BATCHES, HEADS, KEY_HEADS, QUERIES, KEYS, WIDTH, CAUSAL, FACTOR, SCALE, FIRST_TENSOR,
) = range(16)  # fmt: skip
# tensors, of four words each: address and strides of batch, head and row
QUERY, KEY, VALUE, OUTPUT, SHIFT, GRAD_OUTPUT, GRAD_QUERY, GRAD_KEY, GRAD_VALUE = range(
    FIRST_TENSOR, FIRST_TENSOR + 36, 4
)
WORDS = FIRST_TENSOR + 36


@compiled
def head_of(job, tensor, batch, head):
    """Return the address of a head's first row."""
    place = read_i64(job, tensor + 1) * batch + read_i64(job, tensor + 2) * head
    return i64(read_i64(job, tensor) + place)


def align(size: Any) -> Any:
    """Round a number of bytes up to a cache line."""
    return (size + 63) // 64 * 64
