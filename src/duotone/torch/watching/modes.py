"""Two modes that watch torch: its functions by the names that users know, and the kernels that they come down to.

A function mode pushed before the model runs lies below the ones that Duotone pushes, so it sees each function as it is
carried out, with the casts that a policy puts before it. Casts are seen among the kernels alone, where autocast's show
too; nothing is seen twice. A call that Duotone carries out with several functions counts as the one that was asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from duotone.torch.casting.region import compute_dtype
from duotone.torch.internals.autograd import in_backward
from duotone.torch.internals.dispatch import MOVING_KERNELS, WatchingMode, casting_kernel
from duotone.torch.nested import tensors_in
from duotone.torch.watching.callers import find_caller
from duotone.torch.watching.observer import Call, MixedOperands, Observer

_aten = torch.ops.aten
# kernels that move nothing and compute nothing; views are recognised by themselves
_NAMES = """
    lift_fresh empty empty_like empty_strided new_empty new_empty_strided zeros_like
    ones_like full_like new_zeros new_ones new_full is_same_size
"""
_NO_ARITHMETIC = MOVING_KERNELS.union(getattr(_aten, name) for name in _NAMES.split())
# functions that are a whole layer: each of their kernels counts as an operation
_LAYERS = frozenset({F.multi_head_attention_forward})
_NARROW = frozenset({torch.bfloat16, torch.float16})
# autograd's own way back, which is not watched
_BACKWARD = frozenset({Tensor.backward, torch.autograd.backward, torch.autograd.grad})


def watch_operations(run: Callable[[], object], observer: Observer) -> None:
    """Call `run`, and give the observer each call of a function and each cast."""
    # callers are looked for inside of this function
    stop = watch_operations.__code__
    functions = _Functions(observer)
    with _Kernels(observer, functions, stop), functions:
        run()
    functions.flush()


def in_keep_float32() -> bool:
    """Return whether `keep_float32` is around this call."""
    return compute_dtype("cpu") == torch.float32


class _Functions(TorchFunctionMode):
    """Names what runs."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer
        self._calls: list[Call] = []
        # the frame of Duotone's mode that carries out the last call, and that call
        self._handler: FrameType | None = None
        self._handler_call: Call | None = None

    @property
    def current(self) -> Call | None:
        """The innermost call that is going on."""
        return self._calls[-1] if self._calls else None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARD:
            return func(*args, **kwargs)
        dtypes = _floating_dtypes((args, kwargs))
        is_narrow = bool(dtypes) and _NARROW.issuperset(dtypes)
        call = Call(func, self._observer.module, _autocast_is_on(), in_keep_float32(), is_narrow)
        self._calls.append(call)
        try:
            result = func(*args, **kwargs)
        finally:
            self._calls.pop()
        call.result = next(iter(_floating_dtypes(result)), None)
        self._end(call)
        return result

    def flush(self) -> None:
        """Give the observer the last call."""
        if self._handler_call is not None:
            self._observer.add_call(self._handler_call)
        self._handler = self._handler_call = None

    def _end(self, call: Call) -> None:
        """Give the observer a call that has ended, those that Duotone's mode makes for one function as one."""
        if call.caller is None:
            # no kernel ran
            return
        handler, whole = call.caller.handler, self._handler_call
        if handler is None or call.caller.handler_func is None:
            self._observer.add_call(call)
        elif handler is self._handler and whole is not None:
            whole.reads |= call.reads
            whole.mixed |= call.mixed
            whole.mixed_operands = whole.mixed_operands or call.mixed_operands
            whole.result = call.result or whole.result
        else:
            self.flush()
            self._handler, self._handler_call = handler, call
            call.func = call.caller.handler_func


class _Kernels(WatchingMode):
    """Sees what is read and written, and in which dtype."""

    def __init__(self, observer: Observer, functions: _Functions, stop: CodeType) -> None:
        super().__init__()
        self._observer = observer
        self._functions = functions
        self._stop = stop

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not in_backward() and not func.is_view and func.overloadpacket not in _NO_ARITHMETIC:
            source = _source_of_copy(func, args)
            if source is None:
                self._add_arithmetic(func, (args, kwargs), result)
            elif source.is_floating_point() and result.is_floating_point() and source.dtype != result.dtype:
                self._add_cast(source, result)
        return result

    def _add_cast(self, source: Tensor, result: Tensor) -> None:
        call = self._functions.current
        # each cast has a source line of its own, whatever call it is for
        caller = find_caller(None if call is None else call.func, self._stop)
        if call is not None:
            call.caller = call.caller or caller
        self._observer.add_cast(source, result, call, caller)

    def _add_arithmetic(self, func: Any, given: Any, result: Any) -> None:
        operands = [tensor for tensor in tensors_in(given) if tensor.is_floating_point()]
        if not operands:
            return
        call = outer = self._functions.current
        alone = outer is None or outer.func in _LAYERS
        if call is None or alone:
            # under autocast a whole layer's products have narrow operands, unless torch widened them inside
            is_narrow = outer is not None and (outer.is_narrow or outer.autocast)
            call = Call(
                func.overloadpacket, self._observer.module, in_keep_float32=in_keep_float32(), is_narrow=is_narrow
            )
        call.caller = call.caller or find_caller((outer or call).func, self._stop)
        # a number beside a tensor widens nothing
        operands = [operand for operand in operands if operand.ndim] or operands
        call.reads |= {operand.dtype for operand in operands}
        if isinstance(result, Tensor):
            is_stream = len({operand.dtype for operand in operands if operand.shape == result.shape}) > 1
            mixed = None
            if torch.Tag.pointwise in func.tags and not alone:
                mixed = _mixed_operands(operands, is_stream, result)
            call.mixed |= is_stream or mixed is not None
            call.mixed_operands = call.mixed_operands or mixed
        if alone:
            call.result = next(iter(_floating_dtypes(result)), None)
            self._observer.add_call(call)


def _mixed_operands(operands: Sequence[Tensor], is_stream: bool, result: Tensor) -> MixedOperands | None:
    """Return those of an elementwise kernel if it read 16 bits and FP32, and wrote FP32."""
    narrow = [operand.dtype for operand in operands if operand.dtype in _NARROW]
    wide = [operand for operand in operands if operand.dtype == torch.float32]
    if not narrow or not wide or result.dtype != torch.float32:
        return None
    return MixedOperands(narrow[0], wide[0], is_stream, result.numel() * result.element_size())


def _floating_dtypes(value: Any) -> dict[torch.dtype, None]:
    """Return the dtypes of the floating-point tensors in a nested structure, in order."""
    return dict.fromkeys(tensor.dtype for tensor in tensors_in(value) if tensor.is_floating_point())


def _source_of_copy(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    """Return what a kernel copies from if it does nothing else."""
    if func.overloadpacket is casting_kernel:
        return args[0]
    return args[1] if func.overloadpacket is _aten.copy_ else None


def _autocast_is_on() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
