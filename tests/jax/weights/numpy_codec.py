"""The split codec again, in NumPy's floating point, as an independent reference for the one in integers."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


def encode(master: Array, name: str) -> tuple[Array, Array]:
    """Return the weights' codes in uint16 and the tails in int16 for FP32 masters."""
    is_nan = np.isnan(master)
    bits = master.view(np.int32)
    if name == "bfloat16":
        tail = np.where(is_nan, 0, bits & 0xFFFF)
        code = np.where(is_nan, (bits >> 16) | 0x40, (bits >> 16) + (tail >> 15))
        return code.astype(np.uint16), tail.astype(np.uint16).view(np.int16)
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = master.astype(np.float16)
        small = np.abs(master) < 2.0**-16
        # FP64 holds every product and sum here exactly
        units = np.rint(np.where(small, master.astype(np.float64), 0.0) * 2.0**40)
        high_units = np.floor((units + 2**15) / 2**16)
        weight = np.where(small, np.copysign(high_units * 2.0**-24, master), nearest).astype(np.float16)
        wide = weight.astype(np.float32)
        difference = bits.astype(np.int64) - wide.view(np.int32)
    tail = np.where(np.abs(wide) < 2.0**-16, units - high_units * 2**16, difference)
    # as hardware does; NumPy leaves a signalling NaN signalling
    quiet = (bits >> 16) & 0x8000 | 0x7E00 | (bits >> 13) & 0x3FF
    code = np.where(is_nan, quiet.astype(np.uint16), weight.view(np.uint16))
    return code, np.where(np.isfinite(wide), tail, 0).astype(np.int16)


def decode(code: Array, tail: Array, name: str) -> NDArray[np.float32]:
    """Return the FP32 masters of weights' codes in uint16 and tails in int16."""
    if name == "bfloat16":
        plain = code.astype(np.uint32) << 16
        joined = plain + tail.astype(np.uint32)
        return np.where(np.isnan(joined.view(np.float32)), plain, joined).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        weight = code.view(np.float16)
        plain = weight.astype(np.float32)
        joined = (plain.view(np.int32) + tail).view(np.float32)
        exact = np.where(joined.astype(np.float16) == weight, joined, plain)
        fixed = (plain.astype(np.float64) + tail * 2.0**-40).astype(np.float32)
    master = np.where(np.abs(plain) < 2.0**-16, fixed, exact)
    return np.where((tail == 0) | ~np.isfinite(plain), plain, master)
