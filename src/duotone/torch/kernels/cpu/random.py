"""Philox4x32-10 for compiled kernels, a tile of elements at a time; the bits are those of `philox`."""

from duotone.torch.kernels.cpu import memory
from duotone.torch.kernels.cpu.formats import i64, u32, u64
from duotone.torch.kernels.cpu.memory import compiled

# elements of a tile; 2 bytes of random bits each
TILE = 2048

_WORD, _HALF = u64(0xFFFF_FFFF), u64(32)
_MULTIPLIER0, _MULTIPLIER1 = u64(0xD2511F53), u64(0xCD9E8D57)
_WEYL0, _WEYL1 = u64(0x9E3779B9), u64(0xBB67AE85)

_write = memory.writer("u32", memory.RANDOM)


@compiled
def fill_tile(target, first, stop, seed, step, parameter):
    """Write 16 random bits for each element from `first`, a multiple of 8, to `stop`, rounded up to whole blocks.

    `parameter` has the stream's number in its highest bits.
    """
    blocks = (stop - first + 7) // 8
    for block in range(blocks):
        counter = u64(first // 8 + block)
        c0, c1, c2, c3 = counter & _WORD, counter >> _HALF, u64(step) & _WORD, u64(parameter)
        k0, k1 = u64(seed) & _WORD, u64(seed) >> _HALF
        for _ in range(10):
            product0, product1 = c0 * _MULTIPLIER0, c2 * _MULTIPLIER1
            c0, c1 = (product1 >> _HALF) ^ c1 ^ k0, product1 & _WORD
            c2, c3 = (product0 >> _HALF) ^ c3 ^ k1, product0 & _WORD
            k0, k1 = (k0 + _WEYL0) & _WORD, (k1 + _WEYL1) & _WORD
        _write(target, i64(4 * block), u32(c0))
        _write(target, i64(4 * block + 1), u32(c1))
        _write(target, i64(4 * block + 2), u32(c2))
        _write(target, i64(4 * block + 3), u32(c3))
