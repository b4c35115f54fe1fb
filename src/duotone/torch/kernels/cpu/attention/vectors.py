"""Instructions on 16 FP32 numbers at a time: what attention does with them, in LLVM's terms.

`multiplier` is a product of matrices by tiles, from BF16 to FP32, by the instruction `vdpbf16ps` of CPUs with
AVX512-BF16: `C[m, n] += A[m, 2 k] * B[2 k, n] + A[m, 2 k + 1] * B[2 k + 1, n]`, two products in a lane. `A` lies in
memory in pairs of neighbours along the sum, with any strides, and `B` in panels of `[pairs][columns][2]`, see
`packing`. The others are the passes over rows of scores. The instructions are written out in assembly since LLVM's
names and types for them have changed from version to version. BF16 subnormals count as zero in them.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from duotone.torch.kernels.cpu.attention.sizes import LANES

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_F32S, _I32S, _I16S = (ir.VectorType(each, LANES) for each in (_F32, _I32, _I16))
_INFINITY = float("inf")
# 2^r = sum of c r^k on [-1/2, 1/2], highest power first: least squares of the relative error, which is 8e-8 at most
_EXP2 = (
    0.00015337577497120947, 0.0013399859890341759, 0.009618519805371761, 0.05550329014658928, 0.24022646248340607,
    0.6931471824645996, 1.0,
)  # fmt: skip
# below, 2^x is zero beside the 1 of a row's largest
_LOWEST = -200.0


def _written_out(function: Callable[..., Any]) -> Any:
    """Return what compiled code calls, without the first argument, which Numba gives."""
    return intrinsic(function)


def multiplier(rows: int, columns: int, adds: bool) -> Any:
    """Return a compiled function that multiplies a tile: `(a, row_bytes, pair_bytes, b, c, c_row_bytes, pairs)`.

    Args:
        rows: of the tile.
        columns: of the tile and of a panel of `b`, a multiple of 16.
        adds: whether the product is added to `c` or written over it.
    """
    width = columns // LANES

    @_written_out
    def multiply(
        context: Any, a: Any, row_bytes: Any, pair_bytes: Any, b: Any, c: Any, c_row_bytes: Any, pairs: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, row_bytes, pair_bytes, b, c, c_row_bytes, pairs = arguments
            targets = [
                _at(builder, builder.add(c, builder.mul(c_row_bytes, _I64(row))), _F32S, 64 * column)
                for row in range(rows)
                for column in range(width)
            ]
            zero = ir.Constant(_F32S, None)
            first = [_load(builder, target, 4) if adds else zero for target in targets]
            before, body, after = builder.block, *(builder.append_basic_block(name) for name in ("pairs", "done"))
            builder.cbranch(builder.icmp_signed(">", pairs, _I64(0)), body, after)
            builder.position_at_end(body)
            pair = builder.phi(_I64)
            sums = [builder.phi(_F32S) for _ in targets]
            panel = builder.add(b, builder.mul(pair, _I64(4 * columns)))
            right = [_load(builder, _at(builder, panel, _I32S, 64 * column), 4) for column in range(width)]
            left = builder.add(a, builder.mul(pair, pair_bytes))
            added = []
            for row in range(rows):
                number = _load(builder, _at(builder, builder.add(left, builder.mul(row_bytes, _I64(row))), _I32, 0), 4)
                both = _spread(builder, number, _I32S)
                for column in range(width):
                    added.append(_dot(builder, sums[row * width + column], both, right[column]))
            following = builder.add(pair, _I64(1))
            for phi, start, end in zip((pair, *sums), (_I64(0), *first), (following, *added), strict=True):
                phi.add_incoming(start, before)
                phi.add_incoming(end, body)
            builder.cbranch(builder.icmp_signed("<", following, pairs), body, after)
            builder.position_at_end(after)
            results = [builder.phi(_F32S) for _ in targets]
            for result, start, end in zip(results, first, added, strict=True):
                result.add_incoming(start, before)
                result.add_incoming(end, body)
            for result, target in zip(results, targets, strict=True):
                builder.store(result, target).align = 4
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return multiply


@_written_out
def row_max(context: Any, scores: Any, visible: Any, vectors: Any) -> Any:
    """Return the largest of the first `visible` scores, which lie in `vectors` times 16; -Inf for none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, visible, vectors = arguments
        largest = cgutils.alloca_once_value(builder, ir.Constant(_F32S, [-_INFINITY] * LANES))
        with cgutils.for_range(builder, vectors) as loop:
            row = _load(builder, _at(builder, scores, _F32S, 0, loop.index), 4)
            hidden = ir.Constant(_F32S, [-_INFINITY] * LANES)
            row = builder.select(_seen(builder, visible, loop.index), row, hidden)
            now = builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", row, now), row, now), largest)
        return _over_lanes(builder, "fmax", [builder.load(largest)])

    return types.float32(*[types.int64] * 3), generate


@_written_out
def row_exp(context: Any, scores: Any, target: Any, visible: Any, vectors: Any, factor: Any, shift: Any) -> Any:
    """Write `2^(score * factor - shift)` in BF16, 0 from the place `visible` on, and return the sum before rounding."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, target, visible, vectors, factor, shift = arguments
        total = cgutils.alloca_once_value(builder, ir.Constant(_F32S, None))
        factor, shift = (_spread(builder, each, _F32S) for each in (factor, shift))
        with cgutils.for_range(builder, vectors) as loop:
            row = _load(builder, _at(builder, scores, _F32S, 0, loop.index), 4)
            power = _exp2(builder, builder.fsub(builder.fmul(row, factor), shift))
            power = builder.select(_seen(builder, visible, loop.index), power, ir.Constant(_F32S, None))
            builder.store(builder.fadd(builder.load(total), power), total)
            builder.store(_bf16(builder, power), _at(builder, target, _I16S, 0, loop.index)).align = 2
        return _over_lanes(builder, "fadd", [_F32(0.0), builder.load(total)])

    return types.float32(*[types.int64] * 4, types.float32, types.float32), generate


@_written_out
def rows_back(context: Any, places: Any, vectors: Any, numbers: Any) -> Any:
    """Write probabilities and gradients of scores of two rows; see `gradients`.

    `places` is `(scores 0, scores 1, grads 0, grads 1, target 0, target 1, probability pairs, gradient pairs,
    visible 0, visible 1)`, `numbers` is `(factor, shift 0, shift 1, delta 0, delta 1)`.
    """
    zero = ir.Constant(_F32S, None)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places, vectors, numbers = arguments
        scores, grads, targets, pairs, visible = _two_by_two(cgutils.unpack_tuple(builder, places))
        factor, *rest = (_spread(builder, each, _F32S) for each in cgutils.unpack_tuple(builder, numbers))
        shifts, deltas = _two_by_two(rest)
        with cgutils.for_range(builder, vectors) as loop:
            probabilities, gradients = [], []
            for row in range(2):
                score = _load(builder, _at(builder, scores[row], _F32S, 0, loop.index), 4)
                grad = _load(builder, _at(builder, grads[row], _F32S, 0, loop.index), 4)
                is_seen = _seen(builder, visible[row], loop.index)
                power = _exp2(builder, builder.fsub(builder.fmul(score, factor), shifts[row]))
                gradient = builder.fmul(power, builder.fsub(grad, deltas[row]))
                probabilities.append(_bf16(builder, builder.select(is_seen, power, zero)))
                gradients.append(_bf16(builder, builder.select(is_seen, gradient, zero)))
                builder.store(gradients[row], _at(builder, targets[row], _I16S, 0, loop.index)).align = 2
            for target, (low, high) in zip(pairs, (probabilities, gradients), strict=True):
                above = builder.shl(builder.zext(high, _I32S), ir.Constant(_I32S, [16] * LANES))
                both = builder.or_(builder.zext(low, _I32S), above)
                builder.store(both, _at(builder, target, _I32S, 0, loop.index)).align = 4
        return context.get_dummy_value()

    return types.void(places, types.int64, numbers), generate


def _two_by_two(values: Any) -> list[Any]:
    return [values[at : at + 2] for at in range(0, len(values), 2)]


def _at(builder: Any, address: Any, kind: Any, offset: int, index: Any = None) -> Any:
    address = builder.add(address, _I64(offset)) if offset else address
    pointer = builder.inttoptr(address, kind.as_pointer())
    return pointer if index is None else builder.gep(pointer, [index])


def _load(builder: Any, pointer: Any, align: int) -> Any:
    load = builder.load(pointer)
    load.align = align
    return load


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_I32S, [0] * LANES))


def _seen(builder: Any, visible: Any, index: Any) -> Any:
    """Return which lanes of a vector are before the place `visible`."""
    lanes = ir.Constant(_I32S, list(range(LANES)))
    left = builder.trunc(builder.sub(visible, builder.mul(index, _I64(LANES))), _I32)
    return builder.icmp_signed("<", lanes, _spread(builder, left, _I32S))


def _over_lanes(builder: Any, name: str, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(_F32, [each.type for each in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{name}.v{LANES}f32")
    # in any order: by halves
    return builder.call(function, arguments, fastmath=("reassoc",))


def _instruction(builder: Any, text: str, constraints: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [each.type for each in arguments])
    return builder.call(ir.InlineAsm(kind, text, constraints), arguments)


def _dot(builder: Any, total: Any, left: Any, right: Any) -> Any:
    return _instruction(builder, "vdpbf16ps $3, $2, $0", "=v,0,v,v", _F32S, [total, left, right])


def _bf16(builder: Any, value: Any) -> Any:
    return _instruction(builder, "vcvtneps2bf16 $1, $0", "=v,v", _I16S, [value])


def _exp2(builder: Any, x: Any) -> Any:
    """Return 2^x of numbers up to 128; NaN stays NaN, -Inf gives 0."""

    def call(name: str, *arguments: Any) -> Any:
        kind = ir.FunctionType(_F32S, [_F32S] * len(arguments))
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32")
        return builder.call(function, arguments)

    lowest = ir.Constant(_F32S, [_LOWEST] * LANES)
    x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
    whole = call("roundeven", x)
    rest = builder.fsub(x, whole)
    power = ir.Constant(_F32S, [_EXP2[0]] * LANES)
    for coefficient in _EXP2[1:]:
        power = call("fma", power, rest, ir.Constant(_F32S, [coefficient] * LANES))
    return _instruction(builder, "vscalefps $2, $1, $0", "=v,v,v", _F32S, [power, whole])
