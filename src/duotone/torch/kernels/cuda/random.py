"""Philox4x32-10 for one tile, as `duotone.torch.kernels.philox` defines it: a block for eight consecutive elements.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3. A thread computes the block of its
own elements, eight of them, or four, which is half of the block, so no bits move between threads.
"""

# Triton unrolls a static_range and wraps a constexpr by itself
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

# in four warps
_THREADS = tl.constexpr(128)
_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)


@triton.jit
def random_16_bits(first, draws, STREAM: tl.constexpr, TILE: tl.constexpr):
    """Return int32 in [0, 2^16) for the `TILE` elements from `first` on, a multiple of `TILE`, which is 512 or 1024.

    `draws` are uint32: the step, the parameter's index, and the two words of the key.
    """
    step, index, key0, key1 = draws
    EACH: tl.constexpr = TILE // _THREADS
    thread = tl.arange(0, _THREADS)
    block = (first + thread * EACH) >> 3
    word0, word1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    word2 = tl.zeros_like(word0) + step
    word3 = tl.zeros_like(word0) + (index | STREAM << 30)
    for _ in tl.static_range(10):
        product0 = word0.to(tl.uint64) * _MULTIPLIER_0
        product1 = word2.to(tl.uint64) * _MULTIPLIER_1
        word0, word1 = (product1 >> 32).to(tl.uint32) ^ word1 ^ key0, product1.to(tl.uint32)
        word2, word3 = (product0 >> 32).to(tl.uint32) ^ word3 ^ key1, product0.to(tl.uint32)
        key0, key1 = key0 + _WEYL_0, key1 + _WEYL_1
    # joined dimensions come last: words are [thread, word] or [thread, word // 2, word % 2], and halves follow
    if EACH == 4:
        is_second = thread % 2 == 1
        words = tl.join(tl.where(is_second, word2, word0), tl.where(is_second, word3, word1))
    else:
        words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (TILE,)).to(tl.int32)
