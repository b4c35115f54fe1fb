"""Stochastic rounding of FP32 to a 16-bit format: up in magnitude with the probability of the discarded fraction.

Gupta et al., "Deep learning with limited numerical precision" (1502.02551), section 3. What a 16-bit weight without a
master, or a 16-bit moment, loses by rounding is then zero on average.
"""

import torch
from torch import Tensor


def round_stochastically(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round FP32 to BF16 or FP16, up in magnitude with the probability that the discarded fraction says.

    Args:
        value: FP32, any shape.
        dtype: `torch.bfloat16` or `torch.float16`.
        random: int32 in [0, 2^16), shaped like `value`.

    Returns:
        `value` in `dtype`. Exact values never move; NaN, Inf and -0 stay; beyond the largest finite value it may
        become Inf.

    >>> value = torch.tensor([1.0, 1.0 + 2**-8, 1.0 + 2**-8])
    >>> round_stochastically(value, torch.bfloat16, torch.tensor([65535, 32767, 32768], dtype=torch.int32))
    tensor([1.0000, 1.0000, 1.0078], dtype=torch.bfloat16)
    """
    if dtype == torch.bfloat16:
        bits = value.view(torch.int32)
        rounded = ((bits + random) & -0x10000).view(torch.float32)
        return torch.where(value.isfinite(), rounded, value).to(dtype)
    # FP16 has the same spacing below 2^-14 as just above it, so the grid is found by exponent, in exact FP64
    exponent = torch.frexp(value).exponent.clamp(min=-13)
    grid = torch.ldexp(torch.ones_like(value, dtype=torch.float64), exponent - 11)
    scaled = value.double().abs() / grid
    rounded = (scaled + random.double() * 2.0**-16).floor() * grid
    return torch.where(value.isfinite(), rounded.float().copysign(value), value).to(dtype)
