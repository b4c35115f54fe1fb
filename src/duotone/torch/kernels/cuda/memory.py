"""Loads and stores through raw addresses, in every format; in between everything is FP32.

16-bit patterns travel as int16. Where `ALIGNED` says that addresses are multiples of 16 and there is no mask, a thread
moves its elements in one access. `WEIGHT` is the resident weight's format; `KIND` is what updates go into: `tail`,
`stochastic`, or nothing for the weight itself, to nearest.
"""

# Triton wraps what is passed to a constexpr by itself
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from duotone.torch.kernels.cuda.formats import decode, encode, float_of, round_stochastically, round_to_nearest
from duotone.torch.kernels.cuda.random import random_16_bits


@triton.jit
def read(address, offsets, mask, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Load elements of a format as FP32; what the mask leaves out is 0, or anything where there is none."""
    if FORMAT == "float32":
        value = load(address, offsets, mask, tl.float32, ALIGNED)
    else:
        bits = load(address, offsets, mask, tl.int16, ALIGNED).to(tl.int32)
        value = float_of(bits, FORMAT)
    return value


@triton.jit
def read_master(weight, tail, offsets, mask, WEIGHT: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Load FP32 masters: of weight and tail where there are both, else the weights themselves."""
    if KIND == "tail":
        weight_bits = load(weight, offsets, mask, tl.int16, ALIGNED).to(tl.int32)
        tail_bits = load(tail, offsets, mask, tl.int16, ALIGNED).to(tl.int32)
        master = decode(weight_bits, tail_bits, WEIGHT)
    else:
        master = read(weight, offsets, mask, WEIGHT, ALIGNED)
    return master


@triton.jit
def write_master(
    weight,
    tail,
    start,
    offsets,
    mask,
    master,
    draws,
    WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Store masters as weights, and their tails where there are any."""
    if WEIGHT == "float32":
        store(weight, offsets, mask, master, tl.float32, ALIGNED)
    else:
        if KIND == "tail":
            bits, tail_bits = encode(master, WEIGHT)
            store(tail, offsets, mask, tail_bits, tl.int16, ALIGNED)
        elif KIND == "stochastic":
            bits = round_stochastically(master, random_16_bits(start, draws, 0, TILE), WEIGHT)
        else:
            bits = round_to_nearest(master, WEIGHT)
        store(weight, offsets, mask, bits, tl.int16, ALIGNED)


@triton.jit
def write_moment(
    address,
    start,
    offsets,
    mask,
    moment,
    draws,
    STREAM: tl.constexpr,
    FORMAT: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Store a moment as FP32, or as BF16 rounded stochastically with the bits of its stream."""
    if FORMAT == "float32":
        store(address, offsets, mask, moment, tl.float32, ALIGNED)
    else:
        bits = round_stochastically(moment, random_16_bits(start, draws, STREAM, TILE), "bfloat16")
        store(address, offsets, mask, bits, tl.int16, ALIGNED)


@triton.jit
def write_float32(address, offsets, mask, value, ALIGNED: tl.constexpr):
    """Store FP32."""
    store(address, offsets, mask, value, tl.float32, ALIGNED)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(address, offsets, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Load elements as they are stored; what the mask leaves out is 0."""
    if mask is None:
        value = tl.load(_pointer(address, DTYPE, ALIGNED) + offsets)
    else:
        value = tl.load(_pointer(address, DTYPE, ALIGNED) + offsets, mask=mask, other=0)
    return value


@triton.jit
def store(address, offsets, mask, value, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Store elements in a type, where the mask allows it."""
    tl.store(_pointer(address, DTYPE, ALIGNED) + offsets, value.to(DTYPE), mask=mask)
