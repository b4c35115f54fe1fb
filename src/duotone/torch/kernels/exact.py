"""Arithmetic of the reference that torch itself does not round as IEEE 754 does, or that takes numbers and tensors."""

import numpy as np
import torch
from torch import Tensor


def sqrt(value: Tensor) -> Tensor:
    """Return square roots rounded to nearest.

    >>> sqrt(torch.tensor(2.0)).item() == float(np.sqrt(np.float32(2.0)))
    True
    """
    # torch's square root is MKL's on CPUs, which is off by a unit in the last place in one value of five
    return value.sqrt() if value.device.type != "cpu" else torch.as_tensor(np.sqrt(value.numpy()), device="cpu")


def float64(value: float | Tensor) -> float | Tensor:
    """Return a number as it is, which is FP64, and a tensor in FP64."""
    return value.double() if isinstance(value, Tensor) else value


def float32(value: float | Tensor) -> float | Tensor:
    """Return a tensor in FP32, and a number as it is: it is rounded by the operation that it meets."""
    return value.float() if isinstance(value, Tensor) else value
