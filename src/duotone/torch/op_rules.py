"""Which operations run in which dtype inside a cast module.

So far the lists are torch.autocast's own for the device, without its weight cache: weights are 16-bit already, and a
cache goes stale when weights change inside a region. On CPUs some operations run in FP32 inside: those whose gradients
torch's kernels sum in 16 bits (`sums_on_cpu`), and FP16 products where the CPU has none (`half_on_cpu`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from duotone.torch.half_on_cpu import PRODUCTS, cpu_lacks_half_products, multiply_in_float32
from duotone.torch.sums_on_cpu import SUMS, sum_in_float32

Function = Callable[..., Any]
# takes the function that was called, its positional and its named arguments, and returns the result
Replacement = Callable[[Function, tuple[Any, ...], Mapping[str, Any]], Any]


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
    elif device_type == "cpu":
        with torch.autocast(device_type, dtype=compute, cache_enabled=False), _Replacing(_on_cpu(compute)):
            yield
    else:
        with torch.autocast(device_type, dtype=compute, cache_enabled=False):
            yield


class _Replacing(TorchFunctionMode):
    """Calls a replacement for some of torch's functions, inside a `with` block."""

    def __init__(self, replacements: Mapping[Function, Replacement]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        replacement = self._replacements.get(func)
        return func(*args, **kwargs) if replacement is None else replacement(func, args, kwargs)


def _on_cpu(compute: torch.dtype) -> Mapping[Function, Replacement]:
    replacements: dict[Function, Replacement] = dict.fromkeys(SUMS, sum_in_float32)
    if compute == torch.float16 and cpu_lacks_half_products():
        replacements |= dict.fromkeys(PRODUCTS, multiply_in_float32)
    return replacements
