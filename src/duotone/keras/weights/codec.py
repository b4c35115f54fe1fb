"""The split codec on Keras' tensors: a 16-bit weight and a 16-bit tail that together are the FP32 master.

The bits are those of `duotone.torch` and `duotone.jax`, so a master means the same in all three. The arithmetic is
`duotone.split_codec`'s, in integers, for XLA may take conversions between floating formats for the identity.
"""

from typing import Any

import keras

from duotone import split_codec
from duotone.keras import backends
from duotone.keras.internals import ops

# a tensor of the backend
Tensor = Any

SPLIT_DTYPES = ("bfloat16", "float16")
TAIL_DTYPE = "int16"
# the largest FP32 master whose weight in FP16 is finite
LARGEST_OF_FLOAT16 = 65519.99609375


def encode(master: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Split FP32 masters into resident weights and their tails.

    Args:
        master: FP32, any shape.
        dtype: `bfloat16` or `float16`.

    Returns:
        The weights in `dtype`, the nearest to the masters, and the tails in int16, both shaped like `master`. NaN
        becomes a quiet NaN with tail 0; Inf, -0 and subnormals are kept exactly. A finite master that rounds to Inf
        keeps its value in BF16; in FP16, whose tail cannot hold it, it becomes Inf.

    >>> weight, tail = encode(ops.array([1.0, 1.0 + 2**-8, 1.001]), "bfloat16")
    >>> ops.convert_to_numpy(ops.cast(weight, "float32")).tolist(), ops.convert_to_numpy(tail).tolist()
    ([1.0, 1.0078125, 1.0], [0, -32768, 8389])
    >>> ops.convert_to_numpy(decode(weight, tail)).tolist()
    [1.0, 1.00390625, 1.0010000467300415]
    """
    bits = backends.bits(master)
    if dtype == "bfloat16":
        code, tail = split_codec.encode_bfloat16(ops, bits)
    else:
        code, tail = split_codec.encode_float16(ops, bits, _float_bits)
    return backends.floats(ops.cast(code, TAIL_DTYPE), dtype), ops.cast(tail, TAIL_DTYPE)


def decode(weight: Tensor, tail: Tensor) -> Tensor:
    """Join resident weights and their tails into the FP32 masters; the inverse of `encode`.

    Args:
        weight: BF16 or FP16, any shape.
        tail: int16, shaped like `weight`.

    Returns:
        FP32 masters. A weight that was edited since its tail was made decodes to a value that rounds back to the
        edited weight, or lies half-way to its neighbour; +-0, Inf and NaN decode to themselves when the tail cannot
        be theirs.
    """
    code, tail = ops.cast(backends.bits(weight), "int32"), ops.cast(tail, "int32")
    if keras.backend.standardize_dtype(weight.dtype) == "bfloat16":
        bits = split_codec.decode_bfloat16(ops, code, tail)
    else:
        bits = split_codec.decode_float16(ops, code, tail, _float_bits)
    return backends.floats(bits, "float32")


def _float_bits(integers: Tensor) -> Tensor:
    return backends.bits(ops.cast(integers, "float32"))
