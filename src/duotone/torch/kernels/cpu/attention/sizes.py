"""Blocks and tiles of attention's kernels, and the memory that a thread needs for them."""

# FP32 numbers in a vector
LANES = 16
# keys in a panel of scores
PANEL = 64
# queries in a tile, and in a block of the forward pass; keys that a softmax is taken over at a time
TILE, BLOCK, CHUNK = 6, 48, 512
# queries in a block, and keys in a tile, of the backward pass
BACKWARD_BLOCK, KEY_TILE = 96, 4


def padded(keys: int) -> int:
    """Return a number of keys rounded up to whole panels.

    >>> padded(65)
    128
    """
    return -(-keys // PANEL) * PANEL


def forward_bytes(keys: int, width: int) -> int:
    """Return the bytes that a thread needs for the forward pass: keys and values laid out, and a block's scores."""
    return 4 * padded(keys) * width + BLOCK * (2 * width + 6 * CHUNK + 4 * width + 8)


def backward_bytes(keys: int, width: int) -> int:
    """Return the bytes that a thread needs for the backward pass: three layouts, two sums, and a block's share."""
    return 14 * padded(keys) * width + BACKWARD_BLOCK * (12 * width + 8 + 14 * PANEL)
