"""An observer that adds up what it sees: operations, casts, modules, saved bytes."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from duotone.torch.casting.operation_table import kinds, kinds_by_name
from duotone.torch.explanation.records import NO_HALF, OUTSIDE, Output, RepeatedCast, Widening
from duotone.torch.internals.autograd import version_of
from duotone.torch.internals.dispatch import OperatorPacket
from duotone.torch.nested import tensors_in
from duotone.torch.watching.callers import Caller, in_emulation
from duotone.torch.watching.modes import in_keep_float32
from duotone.torch.watching.observer import Call
from duotone.torch.watching.saved import SavedBytes, dtype_name, storage_keys
from duotone.wording.records import Cast, Operation, SavedForBackward

# what code calls to cast; a cast inside of any other function is that function's, or autocast's for it
_CAST_NAMES = "to float half bfloat16 double type type_as copy_ __setitem__"
_CASTS = frozenset(getattr(Tensor, name) for name in _CAST_NAMES.split())
# functions of `widened` that round an operand to FP16, as any cast to FP16 does, before they widen it
_ROUNDS_OPERANDS = ("_narrowed",)
_OPERATORS = frozenset({"add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"})


@dataclass
class ModuleTotals:
    """What was seen of one module; dtypes are in the order in which they came.

    Attributes:
        calls: how often it ran.
        input_dtypes: of the tensors that it was called with.
        output_dtypes: of those that it returned.
        saved_bytes: activations that were saved while it was the innermost module, by dtype.
        kept_float32_bytes: the part of their FP32 that is meant.
    """

    calls: int = 0
    input_dtypes: dict[str, None] = field(default_factory=dict)
    output_dtypes: dict[str, None] = field(default_factory=dict)
    saved_bytes: Counter[str] = field(default_factory=Counter)
    kept_float32_bytes: int = 0


class Totals:
    """An `Observer`, and the way from what it saw to the records of an `Explanation`.

    Args:
        model: whose parameters and buffers are known by name, and are counted apart among what is saved.
        has_policy: whether a policy is behind what autocast does.

    Attributes:
        running: paths of the modules that are running, the innermost last.
        modules: what was seen of each module, by path; also of `OUTSIDE`.
        casts: every cast by itself.
        emulated_casts: those around FP16 products that this CPU does not have.
        widenings: every call in which a 16-bit and an FP32 tensor met.
        outputs: what the model returned.
    """

    def __init__(self, model: nn.Module, has_policy: bool) -> None:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {key: name for name, tensor in tensors for key in storage_keys(tensor)}
        self._buffers = {name for name, _ in model.named_buffers()}
        self._has_policy = has_policy
        self.running: list[str] = []
        self.modules: defaultdict[str, ModuleTotals] = defaultdict(ModuleTotals)
        self._saved = SavedBytes(tensor for _, tensor in tensors)
        self._operations: defaultdict[tuple[Any, ...], tuple[Counter[str], dict[str, None]]] = defaultdict(
            lambda: (Counter(), {})
        )
        self.casts: list[Cast] = []
        self.emulated_casts: list[Cast] = []
        self.widenings: list[Widening] = []
        # by what makes casts casts of the same tensor to the same dtype
        self._casts_of: defaultdict[tuple[Any, ...], list[Cast]] = defaultdict(list)
        self._cast_from: dict[Hashable, torch.dtype] = {}
        self._rounded_in: dict[Hashable, str] = {}
        self.outputs: dict[Hashable, Output] = {}

    @property
    def module(self) -> str:
        """The path of the innermost module that is running, or `OUTSIDE`."""
        return self.running[-1] if self.running else OUTSIDE

    def add_inputs(self, path: str, inputs: Any) -> None:
        """Count a call of a module."""
        self.modules[path].calls += 1
        self.modules[path].input_dtypes.update((dtype_name(tensor.dtype), None) for tensor in tensors_in(inputs))

    def add_outputs(self, path: str, outputs: Any) -> None:
        """Keep the dtypes of what a module returned; a tensor that the model returns again counts once."""
        tensors = tensors_in(outputs)
        self.modules[path].output_dtypes.update((dtype_name(tensor.dtype), None) for tensor in tensors)
        for tensor in tensors if path == "" else ():
            for key in storage_keys(tensor) if tensor.is_floating_point() else ():
                computed = self._cast_from.get(key, tensor.dtype)
                self.outputs[key] = Output(
                    dtype_name(tensor.dtype),
                    dtype_name(computed),
                    tuple(tensor.shape),
                    tensor.numel() * tensor.element_size(),
                    self._rounded_in.get(key) if computed != tensor.dtype else None,
                )

    def add_saved(self, tensor: Tensor) -> None:
        """Count a tensor that autograd saved for the module that is running."""
        added = self._saved.add(tensor)
        module = self.modules[self.module]
        module.saved_bytes.update(added)
        wide = added.get("float32", 0)
        if wide and (in_keep_float32() or in_emulation()):
            module.kept_float32_bytes += wide

    def add_call(self, call: Call) -> None:
        """Count a call that has ended, if it did arithmetic in floating point."""
        if not call.reads or call.caller is None:
            return
        # the widest: what kernels read together is promoted to it
        compute = max(call.reads, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16))
        result = call.result or compute
        name, line, mixed = function_name(call.func), call.caller.source_line, call.mixed_operands
        reason = _reason(call) if compute == torch.float32 else None
        if mixed is not None and result == torch.float32 and reason is None and not call.caller.by_duotone:
            tensor_name = next((self._names[key] for key in storage_keys(mixed.wide) if key in self._names), None)
            self.widenings.append(
                Widening(
                    operation=name,
                    module=call.module,
                    source_line=line,
                    from_dtype=dtype_name(mixed.narrow),
                    name=tensor_name,
                    is_buffer=tensor_name in self._buffers,
                    is_stream=mixed.is_stream,
                    calls=1,
                    result_bytes=mixed.result_bytes,
                )
            )
        key = (name, _kind(call.func), dtype_name(compute), dtype_name(result), call.mixed, reason)
        modules, source_lines = self._operations[key]
        modules[call.module] += 1
        if line is not None:
            source_lines[line] = None

    def add_cast(self, source: Tensor, result: Tensor, call: Call | None, caller: Caller) -> None:
        """Count a copy of `source` in another dtype."""
        by, operation = self._asked_by(call, caller)
        dtypes = dtype_name(source.dtype), dtype_name(result.dtype)
        size = result.numel() * result.element_size()
        cast = Cast(*dtypes, by, self.module, operation, caller.source_line, 1, size)
        if caller.emulation is not None and not (caller.emulation in _ROUNDS_OPERANDS and cast.to_dtype == "float16"):
            self.emulated_casts.append(cast)
            return
        self.casts.append(cast)
        for key in storage_keys(source):
            version = version_of(source)
            same = source.storage_offset(), tuple(source.shape), source.stride(), version, cast.to_dtype
            self._casts_of[key, *same].append(cast)
        at_border = by == "duotone" and operation is None and cast.module not in ("", OUTSIDE)
        rounded_before = [self._rounded_in[key] for key in storage_keys(source) if key in self._rounded_in]
        for key in storage_keys(result):
            self._cast_from[key] = source.dtype
            if at_border and source.dtype == torch.float32:
                self._rounded_in[key] = cast.module
            elif rounded_before and result.dtype == torch.float32:
                self._rounded_in[key] = rounded_before[0]

    def operations(self) -> tuple[Operation, ...]:
        """Return the operations, the most called first."""
        operations = [
            Operation(name, kind, compute, output, modules.total(), mixed, dict(modules), tuple(source_lines), reason)
            for (name, kind, compute, output, mixed, reason), (modules, source_lines) in self._operations.items()
        ]
        return tuple(sorted(operations, key=lambda operation: -operation.calls))

    def repeated_casts(self) -> tuple[RepeatedCast, ...]:
        """Return the casts of one tensor to one dtype that came more than once, the most wasteful first."""
        repeated = [
            RepeatedCast(
                from_dtype=casts[0].from_dtype,
                to_dtype=casts[0].to_dtype,
                shape=shape,
                name=self._names.get(key),
                times=len(casts),
                wasted_bytes=sum(cast.result_bytes for cast in casts[1:]),
                modules=tuple(dict.fromkeys(cast.module for cast in casts)),
                source_lines=tuple(dict.fromkeys(cast.source_line for cast in casts if cast.source_line)),
            )
            for (key, _, shape, *_), casts in self._casts_of.items()
            if len(casts) > 1
        ]
        return tuple(sorted(repeated, key=lambda each: -each.wasted_bytes))

    def saved_for_backward(self) -> SavedForBackward:
        """Return what autograd saved."""
        counts = self._saved.activation_bytes, self._saved.parameter_bytes, self.modules[OUTSIDE].saved_bytes
        return SavedForBackward(*map(dict, counts))

    def _asked_by(self, call: Call | None, caller: Caller) -> tuple[str, str | None]:
        """Return who asked for a cast, and the operation that it was for."""
        if caller.by_duotone:
            # a mode around a module is handed the casts at the module's border
            handler_func = caller.handler_func
            # the inputs of a function that keep_float32 wraps are at no module's border
            is_border = handler_func in _CASTS and not in_keep_float32()
            return "duotone", None if handler_func is None or is_border else function_name(handler_func)
        if call is None or call.func in _CASTS:
            return "model", None if call is None else function_name(call.func)
        by = ("duotone" if self._has_policy else "autocast") if call.autocast else "torch"
        return by, function_name(call.func)


def function_name(func: Callable[..., Any]) -> str:
    """Return a function's name as users write it.

    >>> function_name(Tensor.__matmul__), function_name(torch.linalg.norm), function_name(Tensor.__radd__)
    ('matmul', 'linalg.norm', 'add')
    """
    name = getattr(func, "__name__", type(func).__name__)
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name[0] in "ri" and name[1:] in _OPERATORS:
            return name[1:]
    name = name.strip("_")
    namespace, _, inner = name.partition("_")
    return f"{namespace}.{inner}" if namespace in ("linalg", "fft", "special", "sparse") else name


def _kind(func: Callable[..., Any]) -> str | None:
    """Return an operation's kind in the table, or None if it is not listed."""
    # an aten operator that no function stands around is listed by its name alone
    is_operator = isinstance(func, OperatorPacket)
    return kinds_by_name().get(func.__name__) if is_operator else kinds().get(func)


def _reason(call: Call) -> str | None:
    """Return why a call computed in FP32, if that is known."""
    if call.in_keep_float32:
        return "keep_float32"
    if call.caller is not None and call.caller.emulation is not None:
        return NO_HALF
    return "torch" if call.is_narrow and not (call.caller and call.caller.by_duotone) else None
