"""Which operations run in which dtype inside a cast module.

So far the lists are torch.autocast's own for the device, without its weight cache: weights are 16-bit already, and a
cache goes stale when weights change inside a region. On CPUs without FP16 matrix products `half_on_cpu` supplies them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from duotone.torch.half_on_cpu import HalfOnCpu, cpu_lacks_half_products


@contextmanager
def region(device_type: str, compute: torch.dtype) -> Iterator[None]:
    """Run the operations inside in `compute` where that is safe and in FP32 where it is not.

    Args:
        device_type: `"cpu"`, `"cuda"`, ... of the tensors inside.
        compute: FP32 switches every surrounding region off.

    >>> with region("cpu", torch.bfloat16):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    if compute == torch.float32:
        with torch.autocast(device_type, enabled=False):
            yield
    elif device_type == "cpu" and compute == torch.float16 and cpu_lacks_half_products():
        with torch.autocast(device_type, dtype=compute, cache_enabled=False), HalfOnCpu():
            yield
    else:
        with torch.autocast(device_type, dtype=compute, cache_enabled=False):
            yield
