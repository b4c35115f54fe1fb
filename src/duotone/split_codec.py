"""The split codec in integers: one source for JAX's arrays and for what Keras calls tensors.

A 16-bit weight and a 16-bit tail are together the FP32 master; `duotone.torch` says the same in floating point. Every
function takes a namespace that has NumPy's functions, `jax.numpy` or `keras.ops`; int32 arrays of it come in and go
out, for the bit patterns ("codes") of weights as for those of masters. Arithmetic on them wraps around.

No value is converted between floating formats: a compiler may take a pair of such conversions for the identity, and
every tail would be 0 (https://github.com/openxla/xla/issues/41605). Nor does it matter whether a device flushes
subnormals to zero: what becomes a float is an integer.
"""

from collections.abc import Callable
from typing import Any

# a module with NumPy's functions, and an int32 array of its framework
Namespace = Any
Integers = Any

_MAGNITUDE = 0x7FFF_FFFF
_INFINITY = 0x7F80_0000
# 2^-16 in FP32 and in FP16: the smallest |weight| in FP16 whose tail is a difference of bit patterns
_FLOAT32_EXACT = 0x3780_0000
_FLOAT16_EXACT = 0x0100
_FLOAT16_NORMAL = 0x0400
_FLOAT16_INFINITY = 0x7C00


def encode_bfloat16(xp: Namespace, bits: Integers) -> tuple[Integers, Integers]:
    """Return the codes of BF16 weights, and their tails, for the bits of FP32 masters.

    Of both only the lower 16 bits count. NaN becomes a quiet NaN with tail 0; Inf, -0 and subnormals are exact.

    >>> import numpy
    >>> code, tail = encode_bfloat16(numpy, numpy.float32([1.0, 1.00390625, 1.001]).view(numpy.int32))
    >>> [hex(number) for number in code], tail.astype(numpy.int16).tolist()
    (['0x3f80', '0x3f81', '0x3f80'], [0, -32768, 8389])
    """
    is_nan = (bits & _MAGNITUDE) > _INFINITY
    # rounding could carry a NaN's significand into the sign, so a NaN is made quiet and leaves no tail
    code = xp.where(is_nan, xp.right_shift(bits, 16) | 0x40, xp.right_shift(bits + 0x8000, 16))
    return code, xp.where(is_nan, 0, bits)


def decode_bfloat16(xp: Namespace, code: Integers, tail: Integers) -> Integers:
    """Return the bits of the FP32 masters of BF16 weights and tails, both as signed numbers of 16 bits."""
    plain = xp.left_shift(code, 16)
    # (code - (tail >> 15)) << 16 | tail is this sum, the tail taken as a signed number
    joined = plain + tail
    # a zero cannot have been rounded up to, nor an infinity down to: such a tail belongs to an earlier weight, and
    # with it just these two would become a NaN
    return xp.where((joined & _MAGNITUDE) > _INFINITY, plain, joined)


def encode_float16(
    xp: Namespace, bits: Integers, float_bits: Callable[[Integers], Integers]
) -> tuple[Integers, Integers]:
    """Return the codes of FP16 weights, and their tails, for the bits of FP32 masters.

    Of both only the lower 16 bits count. What lies beyond FP16's numbers becomes Inf.

    Args:
        xp: the namespace.
        bits: of FP32 masters.
        float_bits: from integers to the bits of the FP32 numbers that they are.
    """
    magnitude = bits & _MAGNITUDE
    # below 2^-16 the master is first put on the grid of 2^-40, then split as an integer of that unit
    units = _shift_to_even(xp, 2 * _significand(magnitude), xp.clip(111 - xp.right_shift(magnitude, 23), 1, 28))
    units = xp.where(bits < 0, -units, units)
    high_units = xp.right_shift(units + 0x8000, 16)
    # the code of a subnormal is its multiple of 2^-24
    code = xp.where(magnitude < _FLOAT32_EXACT, abs(high_units), _nearest_float16(xp, magnitude))
    # weight and master have one sign, so the difference of their patterns is that of their magnitudes
    tail = xp.where(
        code < _FLOAT16_EXACT,
        units - xp.left_shift(high_units, 16),
        magnitude - _float32_from(xp, code, float_bits),
    )
    tail = xp.where(code >= _FLOAT16_INFINITY, 0, tail)
    return xp.where(bits < 0, code | -0x8000, code), tail


def decode_float16(
    xp: Namespace, code: Integers, tail: Integers, float_bits: Callable[[Integers], Integers]
) -> Integers:
    """Return the bits of the FP32 masters of FP16 weights and tails, both as signed numbers of 16 bits."""
    magnitude = code & 0x7FFF
    plain = _float32_from(xp, magnitude, float_bits)
    joined = plain + tail
    # a tail that leads to another weight was made for another weight
    belongs = (magnitude < _FLOAT16_INFINITY) & (_nearest_float16(xp, joined) == magnitude)
    exact = xp.where(belongs, joined, plain)
    units = xp.where(code < 0, -magnitude, magnitude) * 0x10000 + tail
    # fewer than 2^24 units, so they are exact as a float, whose exponent is then lowered by 40
    fixed = float_bits(units) - (40 << 23)
    small = (magnitude < _FLOAT16_EXACT) & (tail != 0)
    return xp.where(small, fixed, xp.where(code < 0, exact | ~_MAGNITUDE, exact))


def _nearest_float16(xp: Namespace, magnitude: Integers) -> Integers:
    """Return the FP16 codes nearest to FP32 patterns without their sign, ties to even; 2^-17 and more."""
    exponent = xp.right_shift(magnitude, 23)
    # FP16's 10 bits of 23; one fewer for each power of two below 2^-14
    rounded = _shift_to_even(xp, _significand(magnitude), xp.clip(126 - exponent, 13, 28))
    # the leading one of the significand, at 2^10, counts as one more of the exponent; so does a carry
    code = xp.minimum(rounded + xp.left_shift(xp.maximum(exponent - 113, 0), 10), _FLOAT16_INFINITY)
    return xp.where(magnitude > _INFINITY, xp.right_shift(magnitude, 13) & 0x3FF | 0x7E00, code)


def _float32_from(xp: Namespace, code: Integers, float_bits: Callable[[Integers], Integers]) -> Integers:
    """Return the FP32 patterns of FP16 codes without their sign; a signalling NaN becomes quiet."""
    # a subnormal is an integer times 2^-24, and an integer this small is exact as a float
    subnormal = xp.where(code == 0, 0, float_bits(code) - (24 << 23))
    wide = xp.left_shift(code, 13) + (112 << 23)
    special = xp.where(code > _FLOAT16_INFINITY, wide | 0x40_0000, wide) + (112 << 23)
    return xp.where(code < _FLOAT16_NORMAL, subnormal, xp.where(code < _FLOAT16_INFINITY, wide, special))


def _significand(magnitude: Integers) -> Integers:
    return magnitude & 0x7F_FFFF | 0x80_0000


def _shift_to_even(xp: Namespace, number: Integers, shift: Integers) -> Integers:
    """Return `number / 2**shift` rounded to nearest even; `shift` is from 1 to 28, `number` below 2^27."""
    half = xp.left_shift(1, shift - 1) - 1
    return xp.right_shift(number + half + (xp.right_shift(number, shift) & 1), shift)
