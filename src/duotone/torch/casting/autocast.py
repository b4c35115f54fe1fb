"""torch.autocast with Duotone's kinds: 16-bit arithmetic for people who keep FP32 weights and cast no model.

Inside, functions of tensors on the region's device run by their kinds, the same on every device. There is no weight
cache, so a weight that changes inside is seen, and one that is used several times is cast each time; its gradients meet
in FP32. A model that `cast` has put into a policy keeps it inside. Left out: torch.jit, and the attributes of
torch.autocast.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch

from duotone.errors import AutocastError, DuotoneWarning
from duotone.torch.casting.half_on_cpu import say_once_how_half_runs_on_cpu
from duotone.torch.casting.handlers import Handlers, handlers_for
from duotone.torch.casting.region import RegionMode, mode_context
from duotone.torch.casting.tracing import not_by_itself
from duotone.torch.internals.compiler import mark_constant
from duotone.torch.internals.dispatch import extension_device, has_no_cuda

Function = TypeVar("Function", bound=Callable[..., Any])

_NARROW = (torch.bfloat16, torch.float16)


class autocast:
    """Run a block of code, or a function, in 16 bits where that is safe and in FP32 where it is not.

    Takes the place of `torch.autocast` and `torch.amp.autocast`: a context, or a decorator of functions and methods,
    that may be entered again inside of itself and in several threads. FP32, BF16 and FP16 tensors are rounded to
    `dtype` (nearest even; NaN and +-0 stay, beyond the range lies Inf) for products, and widened for exponentials,
    sums and losses; norms and softmax give the dtype that they are given. Gradients of FP32 weights are FP32.

    Args:
        device_type: `"cpu"`, `"cuda"`, ...; tensors elsewhere are left alone.
        dtype: BF16 or FP16; None for `torch.get_autocast_dtype(device_type)`: BF16 on CPUs, FP16 on CUDA, and that of
            the region that it is in, if any. FP32 on CUDA widens what is listed; elsewhere it switches autocast off.
        enabled: False for a part in which autocast is off.
        cache_enabled: without effect, there is no cache.

    Raises:
        AutocastError: there is no such device, or it has no autocast or no BF16, the dtype is none, or what is
            decorated is no function.

    Warns:
        DuotoneWarning: the region is off, because the device has no autocast in `dtype` or there is no CUDA.

    >>> weight = torch.ones(2, 2, requires_grad=True)
    >>> with autocast("cpu", torch.bfloat16):
    ...     y = weight @ weight
    ...     y.dtype, y.exp().dtype, torch.get_autocast_dtype("cpu")
    (torch.bfloat16, torch.float32, torch.bfloat16)
    >>> y.sum().backward()
    >>> weight.grad.dtype
    torch.float32
    """

    def __init__(
        self,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        self._device_type = _checked(device_type)
        self._dtype = torch.get_autocast_dtype(device_type) if dtype is None else _checked_dtype(dtype)
        self._enabled = bool(enabled) and _works(self._device_type, self._dtype)
        if self._enabled:
            _make_handlers(self._dtype, self._device_type)
            if self._device_type == "cpu" and self._dtype == torch.float16 and not torch.compiler.is_compiling():
                say_once_how_half_runs_on_cpu()
        # by thread, the innermost last
        self._entered: dict[int, list[AbstractContextManager[Any]]] = {}

    def _context(self) -> AbstractContextManager[Any]:
        if self._enabled:
            return mode_context(
                RegionMode(_handlers(self._dtype, self._device_type), self._device_type, self._dtype, is_users=True)
            )
        return _off(self._device_type, self._dtype)

    @not_by_itself
    def __enter__(self) -> "autocast":
        context = self._context()
        context.__enter__()
        self._entered.setdefault(_thread(), []).append(context)
        return self

    @not_by_itself
    def __exit__(self, *error: Any) -> None:
        thread = _thread()
        contexts = self._entered[thread]
        context = contexts.pop()
        if not contexts:
            del self._entered[thread]
        context.__exit__(*error)

    def __call__(self, function: Function) -> Function:
        if not callable(function):
            raise AutocastError(
                f"autocast decorates functions, not {function!r:.60}; for a block of code write "
                '"with autocast(device_type):"'
            )

        @functools.wraps(function)
        def in_autocast(*args: Any, **kwargs: Any) -> Any:
            # a context of its own for each call, which a tracer follows, too
            with self._context():
                return function(*args, **kwargs)

        return in_autocast  # type: ignore[return-value]


def _handlers(dtype: torch.dtype, device_type: str) -> Handlers:
    return handlers_for(dtype, "cpu" if device_type == "cpu" else "cuda")


def _make_handlers(dtype: torch.dtype, device_type: str) -> None:
    _handlers(dtype, device_type)


# a tracer calls it and does not follow
mark_constant(_make_handlers)


@contextmanager
def _off(device_type: str, dtype: torch.dtype) -> Iterator[None]:
    # the mode of an outer region sees that autocast is off, or that it has another dtype
    with torch.autocast(device_type, dtype, enabled=False, cache_enabled=False):
        yield


def _thread() -> int:
    # a tracer has one, and does not know its number
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _checked(device_type: object) -> str:
    if not isinstance(device_type, str):
        raise AutocastError(
            f'the device type of an autocast is a str such as "cuda" or "cpu", not {device_type!r:.60}; '
            "write tensor.device.type"
        )
    if not _has_autocast(device_type):
        raise AutocastError(f'there is no autocast for device type "{device_type}"; take "cpu", "cuda" or "xpu"')
    return device_type.partition(":")[0]


def _has_autocast(device_type: str) -> bool:
    try:
        return torch.amp.is_autocast_available(device_type)
    except RuntimeError:
        return False


# torch 2.11 cannot trace the question
mark_constant(_has_autocast)


def _checked_dtype(dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise AutocastError(f"the dtype of an autocast is torch.bfloat16 or torch.float16, not {dtype!r:.60}")
    return dtype


def _works(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether there is autocast in a dtype, and warn if there is none."""
    if torch.compiler.is_compiling():
        return dtype in _NARROW
    why = None
    if device_type == "cuda":
        if has_no_cuda():
            why = "there is no CUDA here"
        elif dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
            raise AutocastError("this CUDA device has no BF16; take dtype=torch.float16")
    allowed = _allowed(device_type)
    if why is None and dtype not in allowed:
        names = " or ".join(str(each) for each in allowed)
        why = f'"{device_type}" has no autocast in {dtype}, but in {names}'
    if why is not None:
        warnings.warn(f"autocast is off: {why}; give enabled=False where that is meant", DuotoneWarning, stacklevel=3)
    return why is None


def _allowed(device_type: str) -> tuple[torch.dtype, ...]:
    if device_type == "cuda":
        return (*_NARROW, torch.float32)
    if device_type == extension_device():
        return tuple(getattr(torch, device_type).get_amp_supported_dtype())
    return _NARROW
