"""Averages of weights in every format, with adversarial values, for the tests of every backend."""

import numpy as np
import torch
from torch import Tensor

from duotone.torch.kernels import AverageBatch, AverageOperand, encode

from .grid import adversarial_masters

FORMATS = ("float32", "bfloat16+tail", "float16+tail", "bfloat16", "float16")
# the first update, common ones, one of which is inexact, and one that is lost in FP32
SHARES = (1.0, 0.5, float(np.float32(1e-3)), 1e-12)


def make_average(form: str, numel: int, index: int) -> AverageOperand:
    """Return an average that stands elsewhere than its master."""
    dtype, _, kind = form.partition("+")
    weight, tail = adversarial_masters(numel, index), None
    if kind:
        weight, tail = encode(weight, getattr(torch, dtype))
    else:
        weight = weight.to(getattr(torch, dtype))
    return AverageOperand(weight, tail, adversarial_masters(numel, 100 + index))


def batch_of(*operands: AverageOperand, device: torch.device | str = "cpu") -> AverageBatch:
    """Return a batch of copies of operands, on a device."""

    def copied(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.empty_like(tensor, device=device).copy_(tensor)

    return AverageBatch(tuple([AverageOperand(*map(copied, operand)) for operand in operands]), {})


def differing(first: AverageBatch, second: AverageBatch) -> list[int]:
    """Return the numbers of the averages that differ in a bit; NaN is NaN whatever its payload."""
    found = []
    for number, (one, other) in enumerate(zip(first.operands, second.operands, strict=True)):
        own, expected = one.average.cpu(), other.average
        same = (own.view(torch.int32) == expected.view(torch.int32)) | (own.isnan() & expected.isnan())
        if not same.all():
            found.append(number)
    return found
