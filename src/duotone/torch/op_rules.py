"""Which operations run in which dtype inside a cast module.

So far the lists are torch.autocast's own for the device, without its weight cache: weights are 16-bit already, and a
cache goes stale when weights change inside a region. On CPUs some operations run in FP32 inside: those whose gradients
torch's kernels sum in 16 bits (`sums_on_cpu`), and FP16 products where the CPU has none (`half_on_cpu`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from duotone.torch.half_on_cpu import PRODUCTS, cpu_has_half_products, multiply_in_float32
from duotone.torch.sums_on_cpu import SUMS, sum_in_float32

Function = Callable[..., Any]
# takes the function that was called, its positional and its named arguments, and returns the result
Replacement = Callable[[Function, tuple[Any, ...], Mapping[str, Any]], Any]


class Region:
    """Where operations run in one dtype where that is safe, and in FP32 where it is not.

    Args:
        compute: FP32, BF16 or FP16; FP32 switches every surrounding region off.

    >>> with Region(torch.bfloat16).on("cpu"):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """

    def __init__(self, compute: torch.dtype) -> None:
        self.compute = compute
        self._on_cpu: dict[Function, Replacement] = dict.fromkeys(SUMS, sum_in_float32)
        if compute == torch.float16 and not cpu_has_half_products():
            self._on_cpu |= dict.fromkeys(PRODUCTS, multiply_in_float32)

    @contextmanager
    def on(self, device_type: str) -> Iterator[None]:
        """Enter the region for tensors on `"cpu"`, `"cuda"`, ..."""
        if self.compute == torch.float32:
            with torch.autocast(device_type, enabled=False):
                yield
        elif device_type == "cpu":
            with torch.autocast(device_type, dtype=self.compute, cache_enabled=False), _Replacing(self._on_cpu):
                yield
        else:
            with torch.autocast(device_type, dtype=self.compute, cache_enabled=False):
                yield

    def still_holds(self, device_type: str) -> bool:
        """Return whether the region, entered around this call, holds here too.

        Autocast follows a recomputation by `torch.utils.checkpoint`; what a CPU needs besides does not.
        """
        if device_type != "cpu" or self.compute == torch.float32 or torch.compiler.is_compiling():
            return True
        return any(isinstance(mode, _Replacing) for mode in _get_current_function_mode_stack())


class _Replacing(TorchFunctionMode):
    """Calls a replacement for some of torch's functions wherever autocast is on."""

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
        # a replacement switches autocast off, and so does a part of the model that computes in FP32
        if replacement is None or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        return replacement(func, args, kwargs)
