"""Reading and writing raw memory in compiled kernels, and the few instructions that Python has no word for.

Each access names its stream (gradients, weights, ...). Streams never overlap, and saying so to LLVM is what lets it
turn a loop over five tensors into vector instructions.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import unpack_tuple
from numba.extending import intrinsic

from duotone.torch.kernels.slots import MAX_MOMENTS

# a function for other compiled functions to call: division follows IEEE 754, and Python has no way in
OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
compiled = njit(**OPTIONS)

GRAD, WEIGHT, TAIL, RANDOM, SUMS, TABLE = range(6)
# one after the other, as many as there may be
MOMENT = 6
_STREAMS = MOMENT + MAX_MOMENTS

_KINDS = {
    "u16": (ir.IntType(16), types.uint16, 2),
    "u32": (ir.IntType(32), types.uint32, 4),
    "i64": (ir.IntType(64), types.int64, 8),
    "f32": (ir.FloatType(), types.float32, 4),
    "f64": (ir.DoubleType(), types.float64, 8),
}


def reader(kind: str, stream: int) -> Any:
    """Return a compiled function `(address, index) -> value` that reads one number of a stream."""
    llvm_type, numba_type, size = _KINDS[kind]

    @intrinsic
    def read(context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            load = builder.load(_pointer(builder, llvm_type, *arguments))
            load.align = size
            _apart(builder, load, stream)
            return load

        return numba_type(types.int64, types.int64), generate

    return read


def writer(kind: str, stream: int) -> Any:
    """Return a compiled function `(address, index, value)` that writes one number of a stream."""
    llvm_type, numba_type, size = _KINDS[kind]

    @intrinsic
    def write(context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, index, value = arguments
            store = builder.store(value, _pointer(builder, llvm_type, address, index))
            store.align = size
            _apart(builder, store, stream)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, numba_type), generate

    return write


def tuple_reader(kind: str, count: int, names: type | None = None) -> Any:
    """Return a compiled function of an address that reads numbers of a table, one after the other, as a tuple.

    Args:
        kind: of the numbers.
        count: how many.
        names: a `NamedTuple` to return them as.
    """
    llvm_type, numba_type, size = _KINDS[kind]
    if count == 0:
        result: Any = types.Tuple(())
    else:
        result = types.UniTuple(numba_type, count) if names is None else types.NamedUniTuple(numba_type, count, names)

    @intrinsic
    def read(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (address,) = arguments
            values = []
            for index in range(count):
                load = builder.load(_pointer(builder, llvm_type, address, ir.IntType(64)(index)))
                load.align = size
                _apart(builder, load, TABLE)
                values.append(load)
            return context.make_tuple(builder, result, values)

        return result(types.int64), generate

    return read


def tuple_writer(kind: str) -> Any:
    """Return a compiled function `(address, tuple)` that writes numbers to a table, each rounded once to the kind."""
    llvm_type, numba_type, size = _KINDS[kind]

    @intrinsic
    def write(context: Any, address: Any, values: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, packed = arguments
            for index, (value, given) in enumerate(zip(unpack_tuple(builder, packed), values.types, strict=True)):
                number = context.cast(builder, value, given, numba_type)
                store = builder.store(number, _pointer(builder, llvm_type, address, ir.IntType(64)(index)))
                store.align = size
                _apart(builder, store, TABLE)
            return context.get_dummy_value()

        return types.void(types.int64, values), generate

    return write


read_i64, write_i64 = reader("i64", TABLE), writer("i64", TABLE)
read_u32, write_u32 = reader("u32", TABLE), writer("u32", TABLE)
read_f64, write_f64 = reader("f64", TABLE), writer("f64", TABLE)
read_f32, write_f32 = reader("f32", TABLE), writer("f32", TABLE)


def _instruction(result: Any, argument: Any, build: Any) -> Any:
    @intrinsic
    def instruction(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return build(builder, *arguments)

        return result(argument), generate

    return instruction


def _half(builder: Any, bits: Any) -> Any:
    return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())


def _half_bits(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))


def _unary(name: str) -> Any:
    def build(builder: Any, value: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic(name, [value.type]), [value])

    return build


f32_of_bits = _instruction(types.float32, types.uint32, lambda builder, bits: builder.bitcast(bits, ir.FloatType()))
bits_of_f32 = _instruction(types.uint32, types.float32, lambda builder, value: builder.bitcast(value, ir.IntType(32)))
f64_of_bits = _instruction(types.float64, types.uint64, lambda builder, bits: builder.bitcast(bits, ir.DoubleType()))
f32_of_f16 = _instruction(types.float32, types.uint16, _half)
# to nearest even
f16_of_f32 = _instruction(types.uint16, types.float32, _half_bits)
round_f32 = _instruction(types.float32, types.float32, _unary("llvm.roundeven"))
floor_f64 = _instruction(types.float64, types.float64, _unary("llvm.floor"))


def _take_next(builder: Any, address: Any) -> Any:
    pointer = builder.inttoptr(address, ir.IntType(64).as_pointer())
    return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "monotonic")


# return the counter at an address and add 1 to it, in one indivisible step
take_next = _instruction(types.int64, types.int64, _take_next)


def _bit_setter() -> Any:
    """Return a compiled function `(address, bits)` that sets bits of a 32-bit number in one indivisible step."""

    @intrinsic
    def set_bits(context: Any, address: Any, bits: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, bits = arguments
            pointer = builder.inttoptr(address, ir.IntType(32).as_pointer())
            builder.atomic_rmw("or", pointer, builder.trunc(bits, ir.IntType(32)), "monotonic")
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return set_bits


set_bits = _bit_setter()


def stack(size: int) -> Any:
    """Return a compiled function of nothing that returns the address of that many bytes of its caller's stack."""

    @intrinsic
    def allocate(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            with builder.goto_entry_block():
                memory = builder.alloca(ir.ArrayType(ir.IntType(8), size))
            memory.align = 64
            return builder.ptrtoint(memory, ir.IntType(64))

        return types.int64(), generate

    return allocate


def _pointer(builder: Any, llvm_type: Any, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, llvm_type.as_pointer()), [index])


def _apart(builder: Any, access: Any, stream: int) -> None:
    module = builder.module
    domain = module.add_metadata(["duotone"])
    scopes = [module.add_metadata([f"duotone stream {number}", domain]) for number in range(_STREAMS)]
    access.set_metadata("alias.scope", module.add_metadata([scopes[stream]]))
    access.set_metadata("noalias", module.add_metadata([scope for scope in scopes if scope is not scopes[stream]]))
