"""Two modes that watch torch: its functions by the names that users know, and the kernels that they come down to.

A function mode pushed before the model runs lies below the ones that Duotone pushes, so it sees each function as it is
carried out, with the casts that a policy puts before it. Casts are counted among the kernels alone, where autocast's
show too; nothing is counted twice. A call that Duotone carries out with several functions counts as the one that was
asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duotone.torch.explanation.ledger import Call, Ledger, Mixed, is_kept
from duotone.torch.explanation.places import find_caller
from duotone.torch.explanation.saved import in_backward

_aten = torch.ops.aten
# kernels that move nothing and reckon nothing; views are recognised by themselves
_NO_ARITHMETIC = frozenset(
    {
        _aten._unsafe_view,
        _aten._reshape_alias,
        _aten.lift_fresh,
        _aten.empty,
        _aten.empty_like,
        _aten.empty_strided,
        _aten.new_empty,
        _aten.new_empty_strided,
        _aten.zeros_like,
        _aten.ones_like,
        _aten.full_like,
        _aten.new_zeros,
        _aten.new_ones,
        _aten.new_full,
        _aten._local_scalar_dense,
        _aten.is_same_size,
    }
)
# functions of which each kernel counts as an operation, since they are a whole layer
_MADE_OF_OTHERS = frozenset({F.multi_head_attention_forward})
_NARROW = frozenset({torch.bfloat16, torch.float16})
# autograd's own way back, which is not explained
_BACKWARD = frozenset({Tensor.backward, torch.autograd.backward, torch.autograd.grad})


class Functions(TorchFunctionMode):
    """Names what runs.

    Args:
        ledger: where finished calls are noted.
        stop: the code that runs the model; callers are looked for inside of it.
    """

    def __init__(self, ledger: Ledger, stop: CodeType) -> None:
        super().__init__()
        self._ledger = ledger
        self._stop = stop
        self._calls: list[Call] = []
        # the mode of Duotone's that carries out the last call, and that call
        self._handler: FrameType | None = None
        self._handled: Call | None = None

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
        call = Call(func, _autocast_is_on(), self._ledger.module, kept=is_kept(), is_narrow=_is_narrow(args, kwargs))
        self._calls.append(call)
        try:
            result = func(*args, **kwargs)
        finally:
            self._calls.pop()
        call.result = _first_floating_dtype(result)
        self._finish(call)
        return result

    def finish(self) -> None:
        """Note the last call."""
        if self._handled is not None:
            self._ledger.note_call(self._handled)
        self._handler = self._handled = None

    def _finish(self, call: Call) -> None:
        if call.caller is None:
            return
        handler = call.caller.handler
        if handler is None or call.caller.handled is None:
            self._ledger.note_call(call)
        elif handler is self._handler and self._handled is not None:
            self._handled.reads |= call.reads
            self._handled.mixed |= call.mixed
            self._handled.widening = self._handled.widening or call.widening
            self._handled.result = call.result or self._handled.result
        else:
            self.finish()
            self._handler, self._handled = handler, call
            call.func = call.caller.handled


class Kernels(TorchDispatchMode):
    """Sees what is read and written, and in which dtype."""

    def __init__(self, ledger: Ledger, functions: Functions, stop: CodeType) -> None:
        super().__init__()
        self._ledger = ledger
        self._functions = functions
        self._stop = stop

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler for seconds, only to keep it away from here; nothing is compiled meanwhile
        return False

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
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        call = self._functions.current
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        floating = [operand for operand in operands if operand.is_floating_point()]
        source = _source_of_copy(func, args)
        if source is not None:
            if source.is_floating_point() and result.is_floating_point() and source.dtype != result.dtype:
                # each cast has a place of its own, whatever call it is for
                caller = find_caller(None if call is None else call.func, self._stop)
                if call is not None and call.caller is None:
                    call.caller = caller
                self._ledger.note_cast(source, result, call, caller)
            return
        if not floating:
            return
        asked = call
        alone = call is None or call.func in _MADE_OF_OTHERS
        if call is None or alone:
            # under autocast a whole layer's products have narrow operands, unless torch widened them inside
            is_narrow = call is not None and (call.is_narrow or call.autocast)
            call = Call(func.overloadpacket, False, self._ledger.module, kept=is_kept(), is_narrow=is_narrow)
        asked = asked or call
        if call.caller is None:
            call.caller = find_caller(asked.func, self._stop)
        wide = [operand for operand in floating if operand.ndim] or floating
        call.reads |= {operand.dtype for operand in wide}
        if isinstance(result, Tensor):
            full = {operand.dtype for operand in wide if operand.shape == result.shape}
            mixed = None
            if torch.Tag.pointwise in func.tags and not alone:
                mixed = _mixed(wide, len(full) > 1, result)
            call.mixed |= len(full) > 1 or mixed is not None
            call.widening = call.widening or mixed
        if alone:
            call.result = _first_floating_dtype(result)
            self._ledger.note_call(call)


def _mixed(operands: Sequence[Tensor], is_stream: bool, result: Tensor) -> Mixed | None:
    """Return what is to be noted of an elementwise kernel if it read 16 bits and FP32, and wrote FP32."""
    narrow = [operand.dtype for operand in operands if operand.dtype in _NARROW]
    wide = [operand for operand in operands if operand.dtype == torch.float32]
    if not narrow or not wide or result.dtype != torch.float32:
        return None
    return Mixed(narrow[0], wide[0], is_stream, result.numel() * result.element_size())


def _is_narrow(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function is given 16-bit tensors, and none that is wider."""
    given = {
        leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    return bool(given) and given <= _NARROW


def _source_of_copy(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    """Return what a kernel copies from if it does nothing else."""
    if func.overloadpacket is _aten._to_copy:
        return args[0]
    return args[1] if func.overloadpacket is _aten.copy_ else None


def _first_floating_dtype(result: Any) -> torch.dtype | None:
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.dtype
    return None


def _autocast_is_on() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
