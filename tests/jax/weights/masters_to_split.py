"""FP32 masters and pairs of weight and tail that reach every case of the codec."""

import numpy as np
from numpy.typing import NDArray

EVERY_16_BITS = np.arange(2**16, dtype=np.uint32)
# where the tail's sign and BF16's rounding turn
EDGE_TAILS = (0, 1, 0x0FFF, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF)


def masters() -> NDArray[np.float32]:
    """Return every upper half of an FP32 pattern with edge and random lower halves, and all around FP16's numbers."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, 2**16, EVERY_16_BITS.size, np.uint32)
    halves = np.concatenate([(EVERY_16_BITS << 16) | low for low in (*EDGE_TAILS, drawn)])
    numbers = EVERY_16_BITS.astype(np.uint16).view(np.float16).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    # the grid of 2^-40, on which FP16 masters below 2^-16 lie, and its own ties
    grid = generator.integers(-(2**25), 2**25, 20_000) * 2.0**-41
    bits = np.concatenate([numbers, ties, grid]).astype(np.float32).view(np.uint32)
    return np.concatenate([halves, bits, bits + np.uint32(1), bits - np.uint32(1)]).view(np.float32)


def pairs() -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """Return every weight with edge and random tails, whether they can be its own or not."""
    drawn = np.random.default_rng(2).integers(0, 2**16, (3, EVERY_16_BITS.size))
    tails = np.concatenate([*(np.full(EVERY_16_BITS.size, tail) for tail in EDGE_TAILS), *drawn])
    codes = np.tile(EVERY_16_BITS.astype(np.uint16), len(EDGE_TAILS) + len(drawn))
    return codes, tails.astype(np.uint16).view(np.int16)
