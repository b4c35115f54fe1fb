"""What was seen during the run, added up as it comes: operations, casts, modules, saved bytes."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from duotone.torch.casting.nested import map_tensors
from duotone.torch.casting.region import compute_dtype
from duotone.torch.explanation.explanation import NO_HALF, OUTSIDE, Cast, Operation, Output, RepeatedCast, Widening
from duotone.torch.explanation.places import Caller, in_emulation
from duotone.torch.explanation.saved import SavedBytes, dtype_name, storages_of


@dataclass
class Call:
    """A call of a torch function that is going on.

    Attributes:
        func: the function, or an aten operator that no function stands around.
        autocast: whether torch.autocast was on when it was called.
        module: the innermost module around it.
        caller: who called it, once somebody has asked.
        reads: dtypes of floating-point tensors that its kernels read or made, with dimensions or without.
        mixed: whether an elementwise kernel read several dtypes.
        widening: what is to be noted of it if its result is FP32.
        result: dtype of its result.
        kept: whether `keep_float32` is around it.
        is_narrow: whether it was given 16-bit operands and none in FP32.
    """

    func: Callable[..., Any]
    autocast: bool
    module: str
    caller: Caller | None = None
    reads: set[torch.dtype] = field(default_factory=set)
    mixed: bool = False
    widening: "Mixed | None" = None
    result: torch.dtype | None = None
    kept: bool = False
    is_narrow: bool = False


@dataclass(frozen=True)
class Mixed:
    """Operands of an elementwise kernel, one in 16 bits and one in FP32."""

    narrow: torch.dtype
    wide: Tensor
    is_stream: bool
    result_bytes: int


@dataclass
class ModuleNotes:
    """What was noted about one module."""

    calls: int = 0
    inputs: dict[str, None] = field(default_factory=dict)
    outputs: dict[str, None] = field(default_factory=dict)


@dataclass
class _Repeats:
    name: str | None
    shape: tuple[int, ...]
    from_dtype: str
    sizes: list[int] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)


class Ledger:
    """Everything that was noted, and the way from it to the records of an `Explanation`.

    Args:
        model: whose parameters and buffers are known by name and counted apart among what is saved.
        has_policy: whether a policy is behind what autocast does.
    """

    def __init__(self, model: nn.Module, has_policy: bool) -> None:
        resident = [*model.named_parameters(), *model.named_buffers()]
        self._names = {key: name for name, tensor in resident for key, _ in storages_of(tensor)}
        self._buffers = {name for name, _ in model.named_buffers()}
        self._has_policy = has_policy
        self.running: list[str] = []
        self.modules: defaultdict[str, ModuleNotes] = defaultdict(ModuleNotes)
        self.saved = SavedBytes(tensor for _, tensor in resident)
        self.saved_by_module: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.kept_by_module: Counter[str] = Counter()
        self._operations: dict[tuple[str, str, str, bool, str | None], tuple[Counter[str], dict[str, None]]] = {}
        self._casts: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        self._emulated: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        self._widenings: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        self._repeats: dict[tuple[Any, ...], _Repeats] = {}
        self._cast_from: dict[StorageWeakRef, torch.dtype] = {}
        self._rounded_in: dict[StorageWeakRef, str] = {}
        self._outputs: dict[StorageWeakRef, Output] = {}

    @property
    def module(self) -> str:
        """The innermost module that is running."""
        return self.running[-1] if self.running else OUTSIDE

    def note_saved(self, tensor: Tensor) -> None:
        """Count a tensor that autograd saved for the module that is running."""
        added = self.saved.add(tensor)
        self.saved_by_module[self.module].update(added)
        if is_kept() or (added.get("float32") and in_emulation()):
            self.kept_by_module[self.module] += added.get("float32", 0)

    def note_call(self, call: Call) -> None:
        """Count a call that has ended, if it did arithmetic in floating point."""
        if not call.reads or call.caller is None:
            return
        # the widest: what kernels read together is promoted to it
        compute = max(call.reads, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16))
        result = call.result or compute
        name, reason = function_name(call.func), _reason(call) if compute == torch.float32 else None
        mixed = call.widening
        if mixed is not None and result == torch.float32 and reason is None and not call.caller.inserted:
            resident = next((self._names[key] for key, _ in storages_of(mixed.wide) if key in self._names), None)
            same = (dtype_name(mixed.narrow), resident, resident in self._buffers, mixed.is_stream)
            self._widenings[name, call.module, call.caller.place, *same].append(mixed.result_bytes)
        key = (name, dtype_name(compute), dtype_name(result), call.mixed, reason)
        modules, places = self._operations.setdefault(key, (Counter(), {}))
        modules[call.module] += 1
        if call.caller.place is not None:
            places[call.caller.place] = None

    def note_cast(self, source: Tensor, result: Tensor, call: Call | None, caller: Caller) -> None:
        """Count a copy of `source` in another dtype."""
        from_dtype, to_dtype = dtype_name(source.dtype), dtype_name(result.dtype)
        size = result.numel() * result.element_size()
        module = self.module
        by, operation = self._who(call, caller)
        if caller.emulation is not None and not (caller.emulation in _ROUNDS_OPERANDS and to_dtype == "float16"):
            self._emulated[from_dtype, to_dtype, by, module, operation, caller.place].append(size)
            return
        self._casts[from_dtype, to_dtype, by, module, operation, caller.place].append(size)
        for key, _ in storages_of(source):
            version = 0 if source.is_inference() else source._version
            same = (key, source.storage_offset(), source.shape, source.stride(), version, result.dtype)
            repeats = self._repeats.setdefault(same, _Repeats(self._names.get(key), tuple(source.shape), from_dtype))
            repeats.sizes.append(size)
            repeats.modules.append(module)
            repeats.places += [caller.place] if caller.place else []
        at_border = by == "duotone" and operation is None and module not in ("", OUTSIDE)
        before = [self._rounded_in[key] for key, _ in storages_of(source) if key in self._rounded_in]
        for key, _ in storages_of(result):
            self._cast_from[key] = source.dtype
            if at_border and source.dtype == torch.float32:
                self._rounded_in[key] = module
            elif before and result.dtype == torch.float32:
                self._rounded_in[key] = before[0]

    def note_outputs(self, outputs: Any) -> None:
        """Note what the model returned; a tensor that it returns again counts once."""
        for tensor in tensors_in(outputs):
            if tensor.is_floating_point():
                for key, _ in storages_of(tensor):
                    computed = self._cast_from.get(key, tensor.dtype)
                    size = tensor.numel() * tensor.element_size()
                    self._outputs[key] = Output(
                        dtype_name(tensor.dtype),
                        dtype_name(computed),
                        tuple(tensor.shape),
                        size,
                        self._rounded_in.get(key) if computed != tensor.dtype else None,
                    )

    def operations(self) -> tuple[Operation, ...]:
        """Return the operations, the most called first."""
        found = [
            Operation(name, compute, output, sum(modules.values()), mixed, dict(modules), tuple(places), reason)
            for (name, compute, output, mixed, reason), (modules, places) in self._operations.items()
        ]
        return tuple(sorted(found, key=lambda operation: -operation.calls))

    def casts(self) -> tuple[Cast, ...]:
        """Return the casts, the largest first."""
        return _as_casts(self._casts)

    def emulated_casts(self) -> tuple[Cast, ...]:
        """Return the casts around FP16 products that this CPU does not have, the largest first."""
        return _as_casts(self._emulated)

    def widenings(self) -> tuple[Widening, ...]:
        """Return where 16-bit and FP32 tensors met, in the order of the run."""
        return tuple(
            Widening(*key, calls=len(sizes), result_bytes=sum(sizes)) for key, sizes in self._widenings.items()
        )

    def repeated_casts(self) -> tuple[RepeatedCast, ...]:
        """Return the casts of one tensor to one dtype that came more than once, the most wasteful first."""
        found = [
            RepeatedCast(
                from_dtype=repeats.from_dtype,
                to_dtype=dtype_name(same[-1]),
                shape=repeats.shape,
                name=repeats.name,
                times=len(repeats.sizes),
                wasted_bytes=sum(repeats.sizes[1:]),
                modules=tuple(dict.fromkeys(repeats.modules)),
                places=tuple(dict.fromkeys(repeats.places)),
            )
            for same, repeats in self._repeats.items()
            if len(repeats.sizes) > 1
        ]
        return tuple(sorted(found, key=lambda repeated: -repeated.wasted_bytes))

    def outputs(self) -> tuple[Output, ...]:
        """Return what the model returned."""
        return tuple(self._outputs.values())

    def _who(self, call: Call | None, caller: Caller) -> tuple[str, str | None]:
        """Return who asked for a cast, and the operation that it was for."""
        if caller.inserted:
            # a mode around a module is handed the casts at the module's border
            handled = caller.handled
            # the inputs of a function that keep_float32 wraps are at no module's border
            is_border = handled in CASTS and not is_kept()
            return "duotone", None if handled is None or is_border else function_name(handled)
        if call is None or call.func in CASTS:
            return "model", None if call is None else function_name(call.func)
        by = ("duotone" if self._has_policy else "autocast") if call.autocast else "torch"
        return by, function_name(call.func)


# functions of `half_on_cpu` that round an operand to FP16, as any cast to FP16 does, before they widen it
_ROUNDS_OPERANDS = ("widen", "_widen")


def is_kept() -> bool:
    """Return whether `keep_float32` is around this call."""
    return compute_dtype("cpu") == torch.float32


def _reason(call: Call) -> str | None:
    """Return why a call computed in FP32, if that is known."""
    if call.kept:
        return "keep_float32"
    if call.caller is not None and call.caller.emulation is not None:
        return NO_HALF
    return "torch" if call.is_narrow and not (call.caller and call.caller.inserted) else None


def _as_casts(noted: dict[tuple[Any, ...], list[int]]) -> tuple[Cast, ...]:
    found = [Cast(*key, calls=len(sizes), result_bytes=sum(sizes)) for key, sizes in noted.items()]
    return tuple(sorted(found, key=lambda cast: -cast.result_bytes))


# what code calls to cast; a cast inside of any other function is that function's, or autocast's for it
CASTS = frozenset(
    {
        Tensor.to,
        Tensor.float,
        Tensor.half,
        Tensor.bfloat16,
        Tensor.double,
        Tensor.type,
        Tensor.type_as,
        Tensor.copy_,
        Tensor.__setitem__,
    }
)


def function_name(func: Callable[..., Any]) -> str:
    """Return a function's name as users write it.

    >>> function_name(Tensor.__matmul__), function_name(torch.nn.functional.linear), function_name(Tensor.__radd__)
    ('matmul', 'linear', 'add')
    """
    name = getattr(func, "__name__", type(func).__name__)
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        for prefix in ("r", "i"):
            if name[1:] in _OPERATORS and name.startswith(prefix):
                return name[1:]
    return name.strip("_")


_OPERATORS = frozenset({"add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"})


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Return the tensors in a nested structure, in order.

    >>> [tensor.item() for tensor in tensors_in({"a": torch.tensor(1), "b": (torch.tensor(2), "text")})]
    [1, 2]
    """
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found
