"""Where operations run by their kinds: a region, entered around a part of a model.

A region is torch.autocast without its weight cache, and a function mode that calls the handlers. The mode decides for
every listed operation that user code calls. Autocast casts what is multiplied inside of functions that torch composes
itself, and tells code that asks that it runs in 16 bits. A weight cache would go stale when weights change inside, and
is not needed where weights are 16-bit already. Whoever switches autocast off or to another dtype inside
(`torch.autocast(enabled=False)`, `torch.amp.custom_fwd`) switches the handlers off with it. `autocast` enters the same
mode, marked as the user's own. Left out: where Python code of torch's calls functions inside of an unlisted function,
autocast alone decides.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from duotone.torch.casting.float32_inside.norms import layer_norm_in_float32
from duotone.torch.casting.handlers import Handlers, are_ready, handlers_for
from duotone.torch.casting.numbers import LARGEST, SMALLEST, divide, widen_beside_number
from duotone.torch.casting.numbers import cast as cast_constant
from duotone.torch.casting.operation_table import Function
from duotone.torch.casting.recomputation import follow_checkpoint, innermost_hook
from duotone.torch.casting.tracing import not_by_itself
from duotone.torch.casting.widened import operands
from duotone.torch.internals.autograd import set_grad_enabled, top_saved_hooks, transforms_are_active
from duotone.torch.internals.dispatch import SEES_MODES, has_default_device, mode_at, mode_count, without_autocast

# modules that call one function, which is a product
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# and those that call one that is not listed
_UNLISTED = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Flatten)


class Region:
    """Where operations run in one dtype where that is safe, and in FP32 where it is not.

    Args:
        compute: BF16 or FP16; FP32 switches off the region that it is in.
        residual: the policy's role: with `"float32"`, lookups give FP32.

    >>> with Region(torch.bfloat16).on("cpu"):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype, torch.ones(2).bfloat16().exp().dtype
    (torch.bfloat16, torch.float32)
    """

    def __init__(self, compute: torch.dtype, residual: str = "compute") -> None:
        self.compute, self.residual = compute, residual
        # looked up here and not in a forward pass, where a tracer would follow
        self._on_cpu, self._elsewhere = (handlers_for(compute, device, residual) for device in ("cpu", "cuda"))
        # what casts FP32 inputs of modules that are products
        self.shared = self._on_cpu.shared
        handlers_for(torch.float32, "cpu")

    def __reduce__(self) -> Any:
        # the handlers are found anew, in another process too
        return Region, (self.compute, self.residual)

    def on(self, device_type: str) -> AbstractContextManager[Any]:
        """Return a context in which tensors on `"cpu"`, `"cuda"`, ... are in the region."""
        if self.compute == torch.float32:
            return torch.autocast(device_type, enabled=False)
        return mode_context(
            RegionMode(self._on_cpu if device_type == "cpu" else self._elsewhere, device_type, self.compute)
        )

    def is_active(self, device_type: str = "cpu") -> bool:
        """Return whether the region of a cast model is entered, and still decides here."""
        if self.compute == torch.float32:
            return True
        if torch.compiler.is_compiling() or not SEES_MODES:
            # a tracer does not show its modes
            return compute_dtype(device_type) is not None
        # the innermost mode first: it is the one nearly always; a loop makes fewer calls than a generator
        for place in range(mode_count() - 1, -1, -1):
            mode = mode_at(place)
            if type(mode) is RegionMode and not mode.is_users:
                return True
        return False

    def is_only_mode(self) -> bool:
        """Return whether a region with this `compute` is entered, and neither another mode nor one of torch.func's."""
        # inside of vmap, torch takes a convolution apart before autocast has cast anything
        # that of a default device, which is the outermost, does nothing to these modules
        count = mode_count()
        # cheaper than is_compiling: tracers other than the compiler have modes of their own
        if torch.compiler.is_dynamo_compiling() or (count != 1 and count != 1 + has_default_device()):
            return False
        if transforms_are_active():
            return False
        mode = mode_at(count - 1)
        return type(mode) is RegionMode and mode.compute is self.compute and not mode.is_users

    def runs_without_mode(self, module: nn.Module) -> bool:
        """Return whether a module runs the same without the mode, under autocast alone, where `is_only_mode`.

        It is so if it calls one function of torch, and that is a product, or one that is not listed; or if it is a
        LayerNorm, whose handler `normalize` calls.
        """
        if type(module) is nn.LayerNorm:
            is_own = getattr(module.forward, "__func__", None) is nn.LayerNorm.forward
            return is_own and self.compute != torch.float32
        on_cpu = self.compute == torch.float16 and not self._on_cpu.products
        return type(module) in (_UNLISTED if on_cpu else _UNLISTED + PRODUCTS)


def normalize(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return what a LayerNorm makes of a tensor in a region, where no mode is asked."""
    with without_autocast():
        return layer_norm_in_float32(
            torch.layer_norm, x, module.normalized_shape, module.weight, module.bias, module.eps
        )


def mode_context(mode: "RegionMode") -> AbstractContextManager[Any]:
    """Return a context in which autocast is on without its cache, and a mode calls the handlers."""
    return _OnCpu(mode) if mode.device_type == "cpu" and not torch.compiler.is_compiling() else _on(mode)


@contextmanager
def _on(mode: "RegionMode") -> Iterator[None]:
    if not torch.compiler.is_compiling():
        mode.outer_hooks = innermost_hook()
    with torch.autocast(mode.device_type, mode.compute, cache_enabled=False), mode:
        yield
    if not torch.compiler.is_compiling():
        mode.end()


class _OnCpu:
    """The same for a CPU, outside of tracers, at a third of the time: what torch.autocast sets, set."""

    def __init__(self, mode: "RegionMode") -> None:
        self._mode = mode

    @not_by_itself
    def __enter__(self) -> None:
        self._mode.outer_hooks = innermost_hook()
        self._before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self._cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", self._mode.compute)
        torch.set_autocast_cache_enabled(False)
        torch.autocast_increment_nesting()
        self._mode.__enter__()

    @not_by_itself
    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        self._mode.end()
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        enabled, dtype = self._before
        torch.set_autocast_enabled("cpu", enabled)
        torch.set_autocast_dtype("cpu", dtype)
        torch.set_autocast_cache_enabled(self._cached)


@contextmanager
def float32_everywhere() -> Iterator[None]:
    """Enter a region, on every device, where listed operations cast 16-bit operands to FP32 and give FP32."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    mode = RegionMode(handlers_for(torch.float32, "cpu"), device_type, torch.float32)
    if not torch.compiler.is_compiling():
        mode.outer_hooks = innermost_hook()
    with (
        torch.autocast("cpu", torch.float32, enabled=False),
        torch.autocast(device_type, torch.float32, enabled=False),
        mode,
    ):
        yield


def compute_dtype(device_type: str) -> torch.dtype | None:
    """Return what products are computed in here, or None outside of regions and where autocast is switched off.

    >>> with float32_everywhere():
    ...     compute_dtype("cpu")
    torch.float32
    """
    dtype = torch.get_autocast_dtype(device_type)
    # nobody but a region that widens has FP32 there
    return dtype if dtype == torch.float32 or torch.is_autocast_enabled(device_type) else None


class RegionMode(TorchFunctionMode):
    """Calls the handlers of listed functions, wherever autocast is as the region left it.

    What `torch.utils.checkpoint` runs again is run under the mode again.

    Args:
        handlers: how functions are carried out.
        device_type: whose autocast it is that has to be as it was left.
        compute: the dtype of products.
        is_users: whether it stands for torch.autocast and not for a part of a cast model: functions of tensors on other
            devices are left alone.

    Attributes:
        outer_hooks: the hooks on saved tensors that were there as it was entered, as `follow_checkpoint` takes them.
    """

    def __init__(self, handlers: Handlers, device_type: str, compute: torch.dtype, *, is_users: bool = False) -> None:
        super().__init__()
        self._handlers = handlers
        self.device_type = device_type
        self.compute = compute
        self.is_users = is_users
        self.outer_hooks: Callable[[], Any] | None = None

    @not_by_itself
    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        tracing = torch.compiler.is_compiling()
        # looked at here too, because this is called for every function
        if tracing or top_saved_hooks(False) is not None or func is set_grad_enabled:
            args = follow_checkpoint(self, func, args, self.outer_hooks)
        handler = self._handlers.find(func) if tracing else self._handlers.untraced.get(func)
        # nearly every product's operands have their dtype already; this spares them most of what follows
        if handler in self._handlers.products and not kwargs and are_ready(args, self.compute):
            return func(*args)
        if (handler is widen_beside_number or handler is divide) and not kwargs:
            other = args[-1]
            # most are beside a tensor, or a number that 16 bits have
            if (
                handler is widen_beside_number or other.dtype is not torch.float32
                if type(other) is Tensor
                else not tracing and type(other) in (float, int) and SMALLEST <= other <= LARGEST
            ):
                return func(*args)
        elif handler is cast_constant and args and (args[0].requires_grad or args[0].dtype is not torch.float32):
            return func(*args, **kwargs) if kwargs else func(*args)
        # another dtype there: a region inside of this one, or the user's own autocast
        # (`compute_dtype` and `no_autocast` are written out here, where every listed function comes by)
        if (
            handler is None
            or torch.get_autocast_dtype(self.device_type) is not self.compute
            or not (self.compute is torch.float32 or torch.is_autocast_enabled(self.device_type))
            or (self.is_users and not self._acts_on(args, kwargs))
        ):
            return func(*args, **kwargs) if kwargs else func(*args)
        with torch.autocast(self.device_type, enabled=False) if tracing else without_autocast():
            return handler(func, args, kwargs or {})

    def end(self) -> None:
        """Note that a region in which this was the mode has ended."""
        if self._handlers.shared is not None:
            self._handlers.shared.end_region()

    def _acts_on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> bool:
        given = (args, tuple(kwargs.values())) if kwargs else args
        device_types = {operand.device.type for operand in operands(given)}
        # what makes a tensor of numbers has no operand
        return not device_types or self.device_type in device_types


def no_autocast(device_type: str) -> Any:
    """Switch autocast off."""
    # the guard of C++ is several times cheaper, but a tracer would not see it
    if torch.compiler.is_compiling():
        return torch.autocast(device_type, enabled=False)
    return without_autocast()
