"""How compiled kernels read and write values, masters and moments in each format. The bits are those of `codec`."""

import math
from typing import Any

import numpy as np

from duotone.torch.kernels.cpu import memory
from duotone.torch.kernels.cpu.memory import (
    bits_of_f32,
    compiled,
    f16_of_f32,
    f32_of_bits,
    f32_of_f16,
    f64_of_bits,
    floor_f64,
    round_f32,
)

# numba widens every sum of 32-bit integers to 64 bits, and vectors with it, unless each result is narrowed again
i16, i32, i64, u16, u32, u64, f32, f64 = (
    np.int16, np.int32, np.int64, np.uint16, np.uint32, np.uint64, np.float32, np.float64,
)  # fmt: skip

_ZERO, _ONE, _SIXTEEN = u32(0), f32(1.0), u32(16)
_HALF_STEP, _QUIET = u32(0x8000), u32(0x40)
_MAGNITUDE, _INFINITY = u32(0x7FFF_FFFF), u32(0x7F80_0000)
# 2^-16 in FP32: the smallest |weight| in FP16 whose tail is a difference of bit patterns
_FP16_EXACT = u32(0x3780_0000)
_TO_UNITS, _OF_UNITS, _FP16_SPACING = f32(2.0**40), f32(2.0**-40), f32(2.0**-24)


@compiled
def _f32_of_bf16(bits):
    return f32_of_bits(u32(u32(bits) << _SIXTEEN))


@compiled
def nearest_bf16(value):
    """Return the nearest BF16, ties to even."""
    bits = bits_of_f32(value)
    high = u32(u32(bits + u32(0x7FFF) + u32((bits >> _SIXTEEN) & u32(1))) >> _SIXTEEN)
    if math.isnan(value):
        high = u32(0x7FC0)
    return u16(high)


@compiled
def _stochastic_bf16(value, random):
    bits = bits_of_f32(value)
    high = u32(u32(bits + u32(random)) >> _SIXTEEN)
    if u32(bits & _MAGNITUDE) >= _INFINITY:
        high = u32(nearest_bf16(value))
    return u16(high)


@compiled
def _stochastic_f16(value, random):
    magnitude = u32(bits_of_f32(value) & _MAGNITUDE)
    # the grid below 2^-14 is that just above it
    exponent = i64(max(i32(magnitude >> u32(23)), i32(113))) - i64(127)
    grid = f64_of_bits(u64(i64(1013) + exponent) << u64(52))
    inverse_grid = f64_of_bits(u64(i64(1033) - exponent) << u64(52))
    scaled = f64(f32_of_bits(magnitude)) * inverse_grid + f64(i32(random)) * f64(2.0**-16)
    rounded = bits_of_f32(f32(floor_f64(scaled) * grid)) | u32(bits_of_f32(value) & ~_MAGNITUDE)
    if magnitude >= _INFINITY:
        rounded = bits_of_f32(value)
    return f16_of_f32(f32_of_bits(u32(rounded)))


def value_reader(dtype: str, stream: int) -> Any:
    """Return a compiled function `(address, index) -> FP32` for a tensor in a dtype."""
    if dtype == "float32":
        return memory.reader("f32", stream)
    read = memory.reader("u16", stream)
    widen = _f32_of_bf16 if dtype == "bfloat16" else f32_of_f16

    @compiled
    def read_value(address, index):
        return widen(read(address, index))

    return read_value


def moment_writer(dtype: str, stream: int) -> Any:
    """Return a compiled function `(address, index, FP32, 16 random bits)` for a moment, BF16 rounded stochastically."""
    if dtype == "float32":
        write_f32 = memory.writer("f32", stream)

        @compiled
        def write_whole(address, index, value, random):
            write_f32(address, index, value)

        return write_whole
    write = memory.writer("u16", stream)

    @compiled
    def write_rounded(address, index, value, random):
        write(address, index, _stochastic_bf16(value, random))

    return write_rounded


def master_reader(weight_format: str) -> Any:
    """Return a compiled function `(weight address, tail address, index) -> FP32 master` for weights in a format."""
    dtype = weight_format.split("+", maxsplit=1)[0]
    if not weight_format.endswith("+tail"):
        read_value = value_reader(dtype, memory.WEIGHT)

        @compiled
        def read_plain(weight, tail, index):
            return read_value(weight, index)

        return read_plain
    read_weight, read_tail = memory.reader("u16", memory.WEIGHT), memory.reader("u16", memory.TAIL)
    decode = _decode_bf16 if dtype == "bfloat16" else _decode_f16

    @compiled
    def read_split(weight, tail, index):
        return decode(read_weight(weight, index), read_tail(tail, index))

    return read_split


def master_writer(weight_format: str) -> Any:
    """Return a compiled function `(weight address, tail address, index, FP32 master, 16 random bits)`."""
    if weight_format == "float32":
        write_f32 = memory.writer("f32", memory.WEIGHT)

        @compiled
        def write_whole(weight, tail, index, master, random):
            write_f32(weight, index, master)

        return write_whole
    write_weight, write_tail = memory.writer("u16", memory.WEIGHT), memory.writer("u16", memory.TAIL)
    if weight_format.endswith("+tail"):
        encode = _encode_bf16 if weight_format == "bfloat16+tail" else _encode_f16

        @compiled
        def write_split(weight, tail, index, master, random):
            high, low = encode(master)
            write_weight(weight, index, high)
            write_tail(tail, index, low)

        return write_split
    rounded = _ROUNDED[weight_format]

    @compiled
    def write_rounded(weight, tail, index, master, random):
        write_weight(weight, index, rounded(master, random))

    return write_rounded


@compiled
def _decode_bf16(weight, tail):
    plain = u32(u32(weight) << _SIXTEEN)
    master = f32_of_bits(u32(plain + u32(i32(i16(tail)))))
    if math.isnan(master):
        master = f32_of_bits(plain)
    return master


@compiled
def _encode_bf16(master):
    bits = bits_of_f32(master)
    high = u32(u32(bits + _HALF_STEP) >> _SIXTEEN)
    if math.isnan(master):
        high = u32(u32(bits >> _SIXTEEN) | _QUIET)
        bits = _ZERO
    return u16(high), u16(bits)


@compiled
def _decode_f16(weight, tail):
    plain = f32_of_f16(weight)
    bits = bits_of_f32(plain)
    difference = i32(i16(tail))
    joined = f32_of_bits(u32(bits + u32(difference)))
    master = plain
    if f32_of_f16(f16_of_f32(joined)) == plain:
        master = joined
    magnitude = u32(bits & _MAGNITUDE)
    if magnitude < _FP16_EXACT:
        master = plain + f32(difference) * _OF_UNITS
    if (difference == i32(0)) | (magnitude >= _INFINITY):
        master = plain
    return master


@compiled
def _encode_f16(master):
    bits = bits_of_f32(master)
    is_small = u32(bits & _MAGNITUDE) < _FP16_EXACT
    in_units = f32(0.0)
    if is_small:
        in_units = master * _TO_UNITS
    units = i32(round_f32(in_units))
    high_units = i32(i32(units + i32(0x8000)) >> i32(16))
    fixed = u32(bits_of_f32(f32(high_units) * _FP16_SPACING) & _MAGNITUDE) | u32(bits & ~_MAGNITUDE)
    weight = f16_of_f32(master)
    if is_small:
        weight = f16_of_f32(f32_of_bits(u32(fixed)))
    weight_bits = bits_of_f32(f32_of_f16(weight))
    magnitude = u32(weight_bits & _MAGNITUDE)
    tail = i32(i32(bits) - i32(weight_bits))
    if magnitude < _FP16_EXACT:
        tail = i32(units - i32(high_units << i32(16)))
    if magnitude >= _INFINITY:
        tail = i32(0)
    return weight, u16(tail)


@compiled
def _nearest_bf16_anyway(value, random):
    return nearest_bf16(value)


@compiled
def _nearest_f16_anyway(value, random):
    return f16_of_f32(value)


_ROUNDED = {
    "bfloat16": _nearest_bf16_anyway,
    "bfloat16+stochastic": _stochastic_bf16,
    "float16": _nearest_f16_anyway,
    "float16+stochastic": _stochastic_f16,
}
