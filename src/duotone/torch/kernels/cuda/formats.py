"""Bit patterns of BF16 and FP16: rounding FP32 to them, and the split of a master into weight and tail.

These are `codec.py` and `round_stochastically.py` on integers; a pattern stands in the low half of an int32. Every FP32
operation here is exact, so neither contraction nor flushing could change a bit; NaN becomes a quiet NaN.
"""

# Triton wraps what is passed to a constexpr by itself
# pyright: reportArgumentType=false

import triton
import triton.language as tl

_MAGNITUDE = tl.constexpr(0x7FFF_FFFF)
_INFINITY = tl.constexpr(0x7F80_0000)
# 2^-16 and 2^-14 in FP32: from where on the tail is a difference of bit patterns, and FP16's smallest normal number
_FP16_EXACT = tl.constexpr(0x3780_0000)
_FP16_NORMAL = tl.constexpr(0x3880_0000)
# what the exponent's bias differs by, in FP16's pattern
_FP16_BIAS = tl.constexpr(112 << 10)


@triton.jit
def bits_of(value):
    """Return FP32 as its pattern in int32."""
    return value.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits, FORMAT: tl.constexpr):
    """Return the FP32 of a pattern of a format."""
    if FORMAT == "float16":
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = (bits << 16 if FORMAT == "bfloat16" else bits).to(tl.float32, bitcast=True)
    return value


@triton.jit
def round_to_nearest(value, FORMAT: tl.constexpr):
    """Round FP32, ties to even."""
    if FORMAT == "float16":
        rounded = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = bits_of(value)
        is_nan = (bits & _MAGNITUDE) > _INFINITY
        rounded = tl.where(is_nan, (bits >> 16) | 0x40, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return rounded


@triton.jit
def narrow(value, DTYPE: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    """Round FP32 to a 16-bit type, ties to even, in the one instruction that a GPU has for it."""
    if IS_INTERPRETED and tl.bfloat16 == DTYPE:
        # Triton's interpreter truncates
        narrowed = round_to_nearest(value, "bfloat16").to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrowed = value.to(DTYPE)
    return narrowed


@triton.jit
def round_stochastically(value, random, FORMAT: tl.constexpr):
    """Round FP32 up in magnitude with the probability of the discarded fraction; `random` is in [0, 2^16)."""
    return _stochastic_float16(value, random) if FORMAT == "float16" else _stochastic_bfloat16(value, random)


@triton.jit
def encode(master, FORMAT: tl.constexpr):
    """Split an FP32 master into the pattern of its weight and its tail."""
    if FORMAT == "float16":
        weight, tail = _encode_float16(master)
    else:
        weight, tail = _encode_bfloat16(master)
    return weight, tail


@triton.jit
def decode(weight, tail, FORMAT: tl.constexpr):
    """Join the pattern of a weight and its tail, both sign-extended, into the FP32 master."""
    return _decode_float16(weight, tail) if FORMAT == "float16" else _decode_bfloat16(weight, tail)


@triton.jit
def _stochastic_bfloat16(value, random):
    bits = bits_of(value)
    magnitude = bits & _MAGNITUDE
    special = tl.where(magnitude > _INFINITY, (bits >> 16) | 0x40, bits >> 16)
    return tl.where(magnitude < _INFINITY, (bits + random) >> 16, special)


@triton.jit
def _stochastic_float16(value, random):
    bits = bits_of(value)
    magnitude = bits & _MAGNITUDE
    # 13 bits are discarded, so the low three of the random bits decide nothing
    normal = tl.minimum(((magnitude + (random >> 3)) >> 13) - _FP16_BIAS, 0x7C00)
    # a subnormal number's pattern is its multiple of 2^-24
    small = magnitude < _FP16_NORMAL
    units = (float_of(tl.where(small, magnitude, 0), "float32") * 2.0**40).to(tl.int32)
    rounded = tl.where(small, (units + random) >> 16, normal)
    return tl.where(magnitude > _INFINITY, 0x7E00, rounded) | ((bits >> 16) & 0x8000)


@triton.jit
def _encode_bfloat16(master):
    bits = bits_of(master)
    is_nan = (bits & _MAGNITUDE) > _INFINITY
    # to nearest, ties away from zero
    weight = tl.where(is_nan, (bits >> 16) | 0x40, (bits >> 16) + ((bits >> 15) & 1))
    return weight, tl.where(is_nan, 0, bits)


@triton.jit
def _decode_bfloat16(weight, tail):
    plain = weight << 16
    joined = plain + tail
    # a tail that would make a NaN belongs to an earlier weight
    return float_of(tl.where((joined & _MAGNITUDE) > _INFINITY, plain, joined), "float32")


@triton.jit
def _encode_float16(master):
    bits = bits_of(master)
    small = (bits & _MAGNITUDE) < _FP16_EXACT
    units = _to_nearest_integer(tl.where(small, master, 0.0) * 2.0**40)
    high_units = (units + 0x8000) >> 16
    # at most 2^8 multiples of 2^-24: the pattern of a subnormal number
    fixed = tl.abs(high_units) | ((bits >> 16) & 0x8000)
    weight = tl.where(small, fixed, round_to_nearest(master, "float16"))
    weight_bits = bits_of(float_of(weight, "float16"))
    magnitude = weight_bits & _MAGNITUDE
    tail = tl.where(magnitude < _FP16_EXACT, units - (high_units << 16), bits - weight_bits)
    return weight, tl.where(magnitude >= _INFINITY, 0, tail)


@triton.jit
def _decode_float16(weight, tail):
    plain = float_of(weight, "float16")
    bits = bits_of(plain)
    magnitude = bits & _MAGNITUDE
    joined = float_of(bits + tail, "float32")
    # a tail that leads to another weight was made for another weight
    exact = tl.where(joined.to(tl.float16).to(tl.float32) == plain, joined, plain)
    fixed = plain + tail.to(tl.float32) * 2.0**-40
    master = tl.where(magnitude < _FP16_EXACT, fixed, exact)
    return tl.where((tail == 0) | (magnitude >= _INFINITY), plain, master)


@triton.jit
def _to_nearest_integer(value):
    """Round |value| < 2^24 to the nearest integer, ties to even, in int32."""
    magnitude = tl.abs(value)
    # from 2^23 on FP32 holds integers only, and below it this sum has no room for a fraction
    rounded = tl.where(magnitude < 2.0**23, (magnitude + 2.0**23) - 2.0**23, magnitude).to(tl.int32)
    return tl.where(value < 0.0, -rounded, rounded)
