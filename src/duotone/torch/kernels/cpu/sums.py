"""Sums of squares on the CPU, in the order that `reference.grad_stats` defines: chunks of parts of rows of lanes.

The 32 lanes of a part are one vector that stays in registers while the part's rows go by, so that the gradient is
read in the order of memory at the memory's speed.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from duotone.torch.kernels.cpu import memory
from duotone.torch.kernels.cpu.formats import f64, i64, value_reader
from duotone.torch.kernels.cpu.memory import compiled, read_f64, read_i64, write_f64
from duotone.torch.kernels.cpu.pieces import CHUNKS, over_pieces
from duotone.torch.kernels.reference import LANES, PARTS, ROWS

# words of a job behind those of pieces; the chunks of a job are as in `table.GradTable`
TARGET, COUNT = CHUNKS + 1, CHUNKS + 2

_PART = ROWS * LANES
_SUMS = PARTS * LANES
_read_sum, _write_sum = memory.reader("f64", memory.SUMS), memory.writer("f64", memory.SUMS)
_scratch = memory.stack(8 * _SUMS)


def squares(dtype: str) -> Any:
    """Return the kernel that writes the sum of squares of each chunk of gradients in a dtype to its number."""
    size = 4 if dtype == "float32" else 2
    add_rows, read_value = _row_adder(dtype), value_reader(dtype, memory.GRAD)

    @compiled
    def chunk_squares(address, length, sums):
        parts = _parts_for(length)
        for part in range(parts):
            first = part * _PART
            rows = max(min(length - first, _PART), 0) // LANES
            add_rows(i64(address + first * size), i64(rows), i64(sums + 8 * part * LANES))
        # the row that is not whole
        first = length // LANES * LANES
        part = first // _PART
        for lane in range(length - first):
            value = f64(read_value(address, first + lane))
            _write_sum(sums, part * LANES + lane, _read_sum(sums, part * LANES + lane) + value * value)
        return _by_halves(sums, parts * LANES)

    @compiled
    def chunk(job, number, sums):
        row = read_i64(job, CHUNKS) + 24 * number
        total = chunk_squares(read_i64(row, 0), read_i64(row, 1), sums)
        write_f64(read_i64(job, TARGET), read_i64(row, 2), total)

    every_chunk = over_pieces(chunk)

    def kernel(job):
        every_chunk(job, _scratch())

    return kernel


def total() -> Any:
    """Return the kernel that adds up `COUNT` sums at `TARGET`, the total going to the first."""

    @compiled
    def chunk_sum(target, first, length, sums):
        parts = _parts_for(length)
        for number in range(parts * LANES):
            _write_sum(sums, number, f64(0.0))
        for number in range(length):
            part, lane = number // _PART, number % LANES
            index = part * LANES + lane
            _write_sum(sums, index, _read_sum(sums, index) + read_f64(target, first + number))
        return _by_halves(sums, parts * LANES)

    def kernel(job):
        sums = _scratch()
        target, count = read_i64(job, TARGET), read_i64(job, COUNT)
        while count > 1:
            chunks = (count + PARTS * _PART - 1) // (PARTS * _PART)
            for chunk in range(chunks):
                first = chunk * PARTS * _PART
                length = min(count - first, PARTS * _PART)
                write_f64(target, chunk, chunk_sum(target, first, length, sums))
            count = chunks

    return kernel


@compiled
def _parts_for(length):
    """Return a power of two of parts that hold a chunk; the sums of all others are 0, and adding 0 changes no bit."""
    parts = 1
    while parts * _PART < length:
        parts *= 2
    return parts


@compiled
def _by_halves(sums, count):
    half = count // 2
    while half > 0:
        for number in range(half):
            _write_sum(sums, number, _read_sum(sums, number) + _read_sum(sums, number + half))
        half //= 2
    return _read_sum(sums, 0)


def _row_adder(dtype: str) -> Any:
    """Return a compiled function `(address, rows, target)` that writes the sums of squares of a part's lanes."""
    lanes = ir.VectorType(ir.DoubleType(), LANES)

    @intrinsic
    def add_rows(context: Any, address: Any, rows: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, rows, target = arguments
            before, body, after = builder.block, *(builder.append_basic_block(name) for name in ("rows", "done"))
            zero, one = ir.IntType(64)(0), ir.IntType(64)(1)
            builder.cbranch(builder.icmp_signed(">", rows, zero), body, after)

            builder.position_at_end(body)
            row, sums = builder.phi(ir.IntType(64)), builder.phi(lanes)
            values = _row_as_f64(builder, dtype, address, row)
            # squares are exact in FP64, so that fusing them with the sum changes no bit
            kind = ir.FunctionType(lanes, (lanes, lanes, lanes))
            multiply_add = get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f64")
            added = builder.call(multiply_add, [values, values, sums])
            next_row = builder.add(row, one)
            for phi, first, following in ((row, zero, next_row), (sums, ir.Constant(lanes, None), added)):
                phi.add_incoming(first, before)
                phi.add_incoming(following, body)
            builder.cbranch(builder.icmp_signed("<", next_row, rows), body, after)

            builder.position_at_end(after)
            result = builder.phi(lanes)
            result.add_incoming(ir.Constant(lanes, None), before)
            result.add_incoming(added, body)
            store = builder.store(result, builder.inttoptr(target, lanes.as_pointer()))
            store.align = 8
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return add_rows


def _row_as_f64(builder: Any, dtype: str, address: Any, row: Any) -> Any:
    def vector(of: Any) -> Any:
        return ir.VectorType(of, LANES)

    stored = {"float32": ir.FloatType(), "float16": ir.HalfType(), "bfloat16": ir.IntType(16)}[dtype]
    load = builder.load(builder.gep(builder.inttoptr(address, vector(stored).as_pointer()), [row]))
    load.align = 4 if dtype == "float32" else 2
    values = load
    if dtype == "bfloat16":
        integers = vector(ir.IntType(32))
        shifted = builder.shl(builder.zext(load, integers), ir.Constant(integers, [16] * LANES))
        values = builder.bitcast(shifted, vector(ir.FloatType()))
    return builder.fpext(values, vector(ir.DoubleType()))
