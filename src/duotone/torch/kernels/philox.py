"""Philox4x32-10: random bits that depend on nothing but a counter and a key.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3. Stochastic rounding draws from it,
so the same seed, step, parameter and element give the same bits on every device, in any order, and after a resume.
This is the plain torch version, in int64 arithmetic; it defines the bits.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFF_FFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Run ten rounds of Philox on four 32-bit counter words.

    Args:
        counter: four int64 tensors that broadcast together, each value in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, each value in [0, 2^32).

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [hex(int(word)) for word in philox4x32((zero, zero, zero, zero), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # a product of two 32-bit words may wrap in int64; both of its halves are still right after masking
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def random_16_bits(numel: int, *, seed: int, step: Tensor, parameter: int, stream: int = 0) -> Tensor:
    """Draw 16 random bits for each element of one parameter in one step.

    Element `e`, in the order of memory, takes half-word `e % 8` (low half first) of the block with counter
    `((e // 8) mod 2^32, e // 2^35, step mod 2^32, parameter + stream * 2^30)`.

    Args:
        numel: how many elements the parameter has; 0 gives an empty tensor.
        seed: any integer; its low 64 bits are the key.
        step: int64, 0-d, on the device of the parameter.
        parameter: the parameter's index in its optimizer, below 2^30.
        stream: which of up to four tensors of the parameter: 0 for its weight, then its moments.

    Returns:
        int32 of shape `(numel,)` with values in [0, 2^16).

    >>> random_16_bits(3, seed=0, step=torch.tensor(1), parameter=0).tolist()
    [5601, 33861, 28330]
    """
    block = torch.arange((numel + 7) // 8, device=step.device)
    words = philox4x32(
        (block & _WORD, block >> 32, step & _WORD, torch.full_like(step, parameter | stream << 30)),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(torch.broadcast_tensors(*halves), dim=-1).flatten()[:numel].to(torch.int32)
