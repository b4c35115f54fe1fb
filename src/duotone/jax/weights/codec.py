"""The split master-weight codec: a 16-bit weight and a 16-bit tail that together are the FP32 master.

BF16: `tail = bits & 0xffff`, `weight = (bits >> 16) + (tail >> 15)`, which is round to nearest, ties away from zero.
FP16: `tail = bits(master) - bits(float32(weight))` with the weight rounded to nearest even, exact for
|weight| >= 2^-16; below that, where FP16's spacing of 2^-24 leaves more than 16 bits behind, the master is kept as
`weight + tail * 2^-40`, within 2^-41. The bits are those of `duotone.torch`, so a master means the same in both.

The integer arithmetic is `duotone.split_codec`'s, and the reasons for it. JAX has no derivative of bits, so both ways
have that of a rounding, which is 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from duotone import split_codec

TAIL_DTYPE = jnp.dtype(jnp.int16)


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
    code, tail = split_codec.encode_bfloat16(jnp, bits)
    return _from_code(code, jnp.bfloat16), tail.astype(TAIL_DTYPE)


def _decode_bfloat16(code: jax.Array, tail: jax.Array) -> jax.Array:
    return split_codec.decode_bfloat16(jnp, code, tail)


def _encode_float16(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    code, tail = split_codec.encode_float16(jnp, bits, _float_bits)
    return _from_code(code, jnp.float16), tail.astype(TAIL_DTYPE)


def _decode_float16(code: jax.Array, tail: jax.Array) -> jax.Array:
    return split_codec.decode_float16(jnp, code, tail, _float_bits)


def _float_bits(integers: jax.Array) -> jax.Array:
    return _bits(integers.astype(jnp.float32))


def _from_code(code: jax.Array, dtype: DTypeLike) -> jax.Array:
    return lax.bitcast_convert_type(code.astype(TAIL_DTYPE), dtype)


_ENCODERS = {jnp.dtype(jnp.bfloat16): _encode_bfloat16, jnp.dtype(jnp.float16): _encode_float16}
_DECODERS = {jnp.dtype(jnp.bfloat16): _decode_bfloat16, jnp.dtype(jnp.float16): _decode_float16}
