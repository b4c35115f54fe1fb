"""Checksums of 16-bit weights, by which a step notices what others have written into them since the last one.

With a weight's bit patterns as integers, its checksum is the sum of `code[i, j, ..] * factor[i] * factor'[j] * ..`
modulo 2^32. All factors are odd, and those of one axis differ, so that no change of one element leaves it as it was,
nor do a permutation or a transposition, and of other changes 1 in 2^32 or so. A checksum of 0 is stored as 1, for 0
says that it is not known, and then nothing is compared.
"""

from typing import Any

from duotone.keras import backends
from duotone.keras.internals import ops

# 2^16 divided by the golden ratio, so that the factors of neighbours have little in common
_FACTOR = 40503
# between the factors of one axis and those of the next
_AXIS = 7919


def checksum(weight: Any) -> Any:
    """Return the checksum of a BF16 or FP16 tensor of any shape: int32, 0-d, never 0.

    >>> int(checksum(ops.cast([0.0, 1.0], "bfloat16")))
    1975250304
    """
    total = ops.cast(backends.bits(weight), "int32")
    # axis by axis: factors take no memory to speak of, and a sharded weight stays where it is
    for axis in reversed(range(len(weight.shape))):
        places = ops.arange(weight.shape[axis], dtype="int32")
        total = ops.sum(total * ((2 * (places + axis * _AXIS) + 1) * _FACTOR), axis=-1)
    return ops.where(total == 0, 1, total)
