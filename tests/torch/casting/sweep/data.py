"""What the sweep calls torch's functions with: data as large as real data are, and a place for the calls.

Images have 512 pixels a side, sequences 4,096 places, sums more than 65,504 terms, and several thousand rows go to few
places: sizes at which 16 bits run out of integers, of range or of digits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_GENERATOR = torch.Generator()


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return normally distributed numbers."""
    return torch.randn(shape, generator=_GENERATOR.manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers from 0.05 to 0.95, whose sums grow with their count."""
    return torch.rand(shape, generator=_GENERATOR.manual_seed(seed)) * 0.9 + 0.05


def ints(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Return integers from 0 up to `high`."""
    return torch.randint(high, shape, generator=_GENERATOR.manual_seed(seed))


# sequences
ROWS, ROWS2 = randn(64, 4096), randn(64, 4096, seed=1)
P, Q = rand(64, 4096), rand(64, 4096, seed=1)
# more terms than FP16 counts
LONG = rand(70_000) + 0.5
ONES = rand(1, 1, 300, 300) + 0.5
IMG, VOL, LINE = randn(1, 2, 512, 512), randn(1, 2, 48, 48, 48), randn(1, 4, 4096)
MAT, MAT2 = randn(512, 512) / 16, randn(512, 512, seed=1) / 16
# a mean of 30 deviations
OFF = randn(64, 4096) + 30
BIG = 100 * (rand(64, 4096) + 0.1)
IDX, FEW = ints(4096, 64, 300), ints(3, 70_000)

# name to function and operands
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {}


def case(name: str, function: Callable[..., Any], *operands: Tensor) -> None:
    """Add a call to the sweep."""
    assert name not in CASES, name
    CASES[name] = function, operands


def named(name: str) -> Callable[..., Any]:
    """Return a function of torch by its name."""
    space, _, inner = name.rpartition(".")
    spaces = (getattr(torch, space),) if space else (torch, F, Tensor)
    return next(getattr(each, inner) for each in spaces if hasattr(each, inner))
