"""The split master-weight codec: a 16-bit weight and a 16-bit tail that together are the FP32 master.

BF16: `tail = bits & 0xffff`, `weight = (bits >> 16) + (tail >> 15)`, which is round to nearest, ties away from zero.
FP16: `tail = bits(master) - bits(float32(weight))` with the weight rounded to nearest even, exact for
|weight| >= 2^-16; below that, where FP16's spacing of 2^-24 leaves more than 16 bits behind, the master is kept as
`weight + tail * 2^-40`, within 2^-41. The bits are those of `duotone.torch`, so a master means the same in both.

All of it is integer arithmetic. Written as conversions, FP32 to 16 bits and back, it would be lost: XLA may take such a
pair for the identity, and does on GPUs (https://github.com/openxla/xla/issues/41605), and every tail would be 0.
Nor does it matter then whether a device flushes subnormals to zero. JAX has no derivative of bits, so both ways have
that of a rounding, which is 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

TAIL_DTYPE = jnp.dtype(jnp.int16)

_MAGNITUDE = 0x7FFF_FFFF
_INFINITY = 0x7F80_0000
# 2^-16 in FP32 and in FP16: the smallest |weight| in FP16 whose tail is a difference of bit patterns
_FLOAT32_EXACT = 0x3780_0000
_FLOAT16_EXACT = 0x0100
_FLOAT16_NORMAL = 0x0400
_FLOAT16_INFINITY = 0x7C00


def encode(master: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Split FP32 masters into resident weights and their tails.

    Args:
        master: FP32, any shape.
        dtype: `bfloat16` or `float16`.

    Returns:
        The weights in `dtype`, the nearest to the masters, and the tails in int16, both shaped like `master`. NaN
        becomes a quiet NaN with tail 0; Inf, -0 and subnormals are kept exactly. A finite master
        that rounds to Inf keeps its value in BF16; in FP16, whose tail cannot hold it, it becomes Inf.

    >>> weight, tail = encode(jnp.float32([1.0, 1.0 + 2**-8, 1.001]), "bfloat16")
    >>> weight.tolist(), tail.tolist()
    ([1.0, 1.0078125, 1.0], [0, -32768, 8389])
    >>> decode(weight, tail).tolist()
    [1.0, 1.00390625, 1.0010000467300415]
    """
    return _encode(jnp.dtype(dtype), master)


def decode(weight: jax.Array, tail: jax.Array) -> jax.Array:
    """Join resident weights and their tails into the FP32 masters; the inverse of `encode`.

    Args:
        weight: BF16 or FP16, any shape.
        tail: int16, shaped like `weight`.

    Returns:
        FP32 masters. A weight that was edited since its tail was made decodes to a value that rounds back to the
        edited weight, or lies half-way to its neighbour; +-0, Inf and NaN decode to themselves when the tail cannot
        be theirs.
    """
    return _decode(weight, tail)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _encode(dtype: jnp.dtype, master: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _ENCODERS[dtype](_bits(master))


@_encode.defjvp
def _encode_derivative(dtype: jnp.dtype, primals: Any, tangents: Any) -> Any:
    weight, tail = _encode(dtype, *primals)
    return (weight, tail), (tangents[0].astype(dtype), np.zeros(tail.shape, jax.dtypes.float0))


@jax.custom_jvp
def _decode(weight: jax.Array, tail: jax.Array) -> jax.Array:
    code = lax.bitcast_convert_type(weight, TAIL_DTYPE).astype(jnp.int32)
    return lax.bitcast_convert_type(_DECODERS[weight.dtype](code, tail.astype(jnp.int32)), jnp.float32)


@_decode.defjvp
def _decode_derivative(primals: Any, tangents: Any) -> Any:
    return _decode(*primals), tangents[0].astype(jnp.float32)


def _bits(floats: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(floats, jnp.int32)


def _encode_bfloat16(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    is_nan = (bits & _MAGNITUDE) > _INFINITY
    # rounding could carry a NaN's significand into the sign, so a NaN is made quiet and leaves no tail
    code = jnp.where(is_nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    return _from_code(code, jnp.bfloat16), jnp.where(is_nan, 0, bits).astype(TAIL_DTYPE)


def _decode_bfloat16(code: jax.Array, tail: jax.Array) -> jax.Array:
    plain = code << 16
    # (code - (tail >> 15)) << 16 | tail is this sum, the tail taken as a signed number
    joined = plain + tail
    # a zero cannot have been rounded up to, nor an infinity down to: such a tail belongs to an earlier weight, and
    # with it just these two would become a NaN
    return jnp.where((joined & _MAGNITUDE) > _INFINITY, plain, joined)


def _encode_float16(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    magnitude = bits & _MAGNITUDE
    # below 2^-16 the master is first put on the grid of 2^-40, then split as an integer of that unit
    units = _shift_to_even(2 * _significand(magnitude), jnp.clip(111 - (magnitude >> 23), 1, 28))
    units = jnp.where(bits < 0, -units, units)
    high_units = (units + 0x8000) >> 16
    # the code of a subnormal is its multiple of 2^-24
    code = jnp.where(magnitude < _FLOAT32_EXACT, abs(high_units), _nearest_float16(magnitude))
    # weight and master have one sign, so the difference of their patterns is that of their magnitudes
    tail = jnp.where(code < _FLOAT16_EXACT, units - (high_units << 16), magnitude - _float32_from(code))
    tail = jnp.where(code >= _FLOAT16_INFINITY, 0, tail).astype(TAIL_DTYPE)
    return _from_code(jnp.where(bits < 0, code | -0x8000, code), jnp.float16), tail


def _decode_float16(code: jax.Array, tail: jax.Array) -> jax.Array:
    magnitude = code & 0x7FFF
    plain = _float32_from(magnitude)
    joined = plain + tail
    # a tail that leads to another weight was made for another weight
    belongs = (magnitude < _FLOAT16_INFINITY) & (_nearest_float16(joined) == magnitude)
    exact = jnp.where(belongs, joined, plain)
    units = jnp.where(code < 0, -magnitude, magnitude) * 0x10000 + tail
    # fewer than 2^24 units, so they are exact as a float, whose exponent is then lowered by 40
    fixed = _bits(units.astype(jnp.float32)) - (40 << 23)
    small = (magnitude < _FLOAT16_EXACT) & (tail != 0)
    return jnp.where(small, fixed, jnp.where(code < 0, exact | ~_MAGNITUDE, exact))


def _nearest_float16(magnitude: jax.Array) -> jax.Array:
    """Return the FP16 codes nearest to FP32 patterns without their sign, ties to even; 2^-17 and more."""
    exponent = magnitude >> 23
    # FP16's 10 bits of 23; one fewer for each power of two below 2^-14
    rounded = _shift_to_even(_significand(magnitude), jnp.clip(126 - exponent, 13, 28))
    # the leading one of the significand, at 2^10, counts as one more of the exponent; so does a carry
    code = jnp.minimum(rounded + (jnp.maximum(exponent - 113, 0) << 10), _FLOAT16_INFINITY)
    return jnp.where(magnitude > _INFINITY, (magnitude >> 13) & 0x3FF | 0x7E00, code)


def _float32_from(code: jax.Array) -> jax.Array:
    """Return the FP32 patterns of FP16 codes without their sign; a signalling NaN becomes quiet."""
    # a subnormal is an integer times 2^-24, and an integer this small is exact as a float
    subnormal = jnp.where(code == 0, 0, _bits(code.astype(jnp.float32)) - (24 << 23))
    wide = (code << 13) + (112 << 23)
    special = jnp.where(code > _FLOAT16_INFINITY, wide | 0x40_0000, wide) + (112 << 23)
    return jnp.where(code < _FLOAT16_NORMAL, subnormal, jnp.where(code < _FLOAT16_INFINITY, wide, special))


def _significand(magnitude: jax.Array) -> jax.Array:
    return magnitude & 0x7F_FFFF | 0x80_0000


def _shift_to_even(number: jax.Array, shift: jax.Array) -> jax.Array:
    """Return `number / 2**shift` rounded to nearest even; `shift` is from 1 to 28, `number` below 2^27."""
    return (number + ((1 << (shift - 1)) - 1) + ((number >> shift) & 1)) >> shift


def _from_code(code: jax.Array, dtype: DTypeLike) -> jax.Array:
    return lax.bitcast_convert_type(code.astype(TAIL_DTYPE), dtype)


_ENCODERS = {jnp.dtype(jnp.bfloat16): _encode_bfloat16, jnp.dtype(jnp.float16): _encode_float16}
_DECODERS = {jnp.dtype(jnp.bfloat16): _decode_bfloat16, jnp.dtype(jnp.float16): _decode_float16}
