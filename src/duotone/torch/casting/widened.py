"""Functions called on FP32 copies of 16-bit operands, of which the backward pass keeps the 16 bits.

    result = round16(function(float32(x), ...))

Autograd sees the conversions, so that gradients are FP32's, rounded once to each operand's dtype. It saves operands
in 16 bits and widens them again for backward: hooks on saved tensors know a widened operand by its memory. Left out:
what a function saves beside its operands, which stays FP32, and torch.compile, torch.func and tensor subclasses, which
take the same numbers without the hooks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duotone.errors import OperationError
from duotone.torch.internals.autograd import (
    can_hook_saved,
    in_transform,
    is_jit_tracing,
    pop_saved_hooks,
    push_saved_hooks,
    top_saved_hooks,
    version_of,
)
from duotone.torch.internals.dispatch import without_autocast
from duotone.torch.internals.tensors import storage_id
from duotone.torch.nested import map_tensors


def call_widened(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    operand: torch.dtype | None = None,
    result: torch.dtype | None = None,
) -> Any:
    """Call a function on FP32 copies of its 16-bit operands, autocast being off.

    Rounding is to nearest even: NaN stays NaN, +-0 and subnormals are kept, beyond the largest number lies Inf. A call
    with `out=` is left alone.

    Args:
        func: any function that changes no operand in place; an operator of `torch.ops.aten` too.
        args: its arguments, nested in tuples, lists and dicts; FP32, BF16 and FP16 tensors are operands, others stay.
        kwargs: its named arguments.
        operand: what every operand is rounded to first; None to take them as they are.
        result: what FP32 tensors in the result are rounded to; None to leave them.

    Returns:
        What `func` returns.

    Raises:
        OperationError: (a `RuntimeError`) in backward, if a 16-bit operand was changed in place since.

    >>> x = torch.full((3,), 0.1, dtype=torch.bfloat16)
    >>> call_widened(torch.sum, (x,), {}), call_widened(torch.sum, (x,), {}, result=torch.bfloat16)
    (tensor(0.3003), tensor(0.3008, dtype=torch.bfloat16))
    """
    if kwargs.get("out") is not None:
        return func(*args, **kwargs)
    if torch.compiler.is_compiling():
        # the compiler follows conversions, not hooks; it widens again in backward by itself
        with torch.autocast("cpu", enabled=False):
            wide_args, wide_kwargs = map_tensors(
                lambda x: _narrowed(x, operand).float() if x.dtype in _FLOATS else x, (args, dict(kwargs))
            )
            return _rounded(func(*wide_args, **wide_kwargs), result)
    call = _Call(func, operand, result)
    # several times cheaper than torch.autocast, but the compiler does not know it
    with without_autocast():
        try:
            return call.run(args, kwargs)
        finally:
            # autograd keeps the hook, and with it the call, as long as what the hook saved
            call.forget()


def widen_and_round(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function in FP32 and round once to its operands' dtype; where they have several, the result stays FP32.

    >>> widen_and_round(torch.sum, (torch.full((3,), 0.1, dtype=torch.bfloat16),), {})
    tensor(0.3008, dtype=torch.bfloat16)
    """
    if kwargs.get("dtype") is not None:
        # a result that is asked for in some dtype is the caller's own choice
        return func(*args, **kwargs)
    dtypes = {operand.dtype for operand in operands((args, tuple(kwargs.values())))}
    return call_widened(func, args, kwargs, result=next(iter(dtypes)) if len(dtypes) == 1 else None)


def widen_to_data(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function in FP32 and round once to the dtype of its first operand: an image, beside where it is read.

    >>> x = torch.full((1, 1, 2, 2), 0.1, dtype=torch.bfloat16)
    >>> widen_to_data(F.grid_sample, (x, torch.zeros(1, 1, 1, 2)), {"align_corners": False}).dtype
    torch.bfloat16
    """
    data = next(iter(operands((args, tuple(kwargs.values())))), None)
    return call_widened(func, args, kwargs, result=None if data is None else data.dtype)


def operands(arguments: Sequence[Any]) -> list[Tensor]:
    """Return the FP32, BF16 and FP16 tensors among arguments, those in tuples and lists included."""
    found: list[Tensor] = []
    # one call for each tuple or list, and none for each argument: all listed functions come by
    for each in arguments:
        if isinstance(each, Tensor):
            if each.dtype in _FLOATS:
                found.append(each)
        elif type(each) in (list, tuple) and each:
            found += operands(each)
    return found


class _Call:
    """One call: which FP32 tensor was widened from which 16-bit one, and what of it is saved for backward."""

    __slots__ = ("by_memory", "by_operand", "func", "hookable", "needs_grad", "operand", "outer", "result", "waiting")

    def __init__(self, func: Callable[..., Any], operand: torch.dtype | None, result: torch.dtype | None) -> None:
        self.func, self.operand, self.result = func, operand, result
        self.needs_grad, self.hookable = False, _hooks_work_here()
        self.by_operand: dict[int, Tensor] = {}
        # a widened tensor's memory -> the 16-bit tensor, the widened one
        self.by_memory: dict[int, tuple[Tensor, Tensor]] = {}
        self.outer: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None = None
        self.waiting: list[tuple[_Saved, Tensor]] | None = None

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        wide_args = [self.widen(value) if isinstance(value, Tensor) else self.widen_in(value) for value in args]
        wide_kwargs = {name: self.widen_in(value) for name, value in kwargs.items()} if kwargs else {}
        if not (self.needs_grad and self.hookable):
            return _rounded(self.func(*wide_args, **wide_kwargs), self.result)

        # autograd calls the innermost hooks only, so those of checkpointing or offloading are called from ours
        self.outer = top_saved_hooks(False)
        if self.func is F.scaled_dot_product_attention:
            self.waiting = []
        push_saved_hooks(self.pack, _Saved.unpack)
        try:
            result = self.func(*wide_args, **wide_kwargs)
        finally:
            pop_saved_hooks()
        rounded = _rounded(result, self.result)
        if self.waiting:
            self.keep_result(result, rounded)
        return rounded

    def forget(self) -> None:
        self.by_operand.clear()
        self.by_memory.clear()
        self.waiting = None

    def widen_in(self, value: Any) -> Any:
        return value if value is None else map_tensors(self.widen, value)

    def widen(self, tensor: Tensor) -> Tensor:
        if tensor.dtype not in _FLOATS or (self.operand is None and tensor.dtype is torch.float32):
            return tensor
        # self-attention is known by its query, key and value being one object
        wide = self.by_operand.get(id(tensor))
        if wide is not None:
            return wide
        half = _narrowed(tensor, self.operand)
        wide = self.by_operand[id(tensor)] = half.float()
        if wide.requires_grad:
            self.needs_grad = True
        if self.hookable:
            is_dense = tensor.layout is torch.strided and not tensor.is_nested
            if type(tensor) in _PLAIN and is_dense and (tensor.is_cpu or tensor.is_cuda):
                self.by_memory[storage_id(wide.untyped_storage())] = half, wide
            else:
                self.hookable = False
        return wide

    def pack(self, tensor: Tensor) -> "_Saved":
        saved = _Saved()
        if self.waiting is None:
            self.keep(saved, tensor)
        else:
            self.waiting.append((saved, tensor))
        return saved

    def keep_result(self, result: Tensor, rounded: Tensor) -> None:
        """Let flash attention save its result as 16-bit flash attention does: rounded, in memory there is."""
        waiting, self.waiting = self.waiting, None
        if self.result and result.dtype is torch.float32 and result.numel() * 4 == result.untyped_storage().nbytes():
            # a result that hooks outside keep would hold its own history, which holds it
            self.by_memory[storage_id(result.untyped_storage())] = rounded.detach(), result
        for saved, tensor in waiting or ():
            self.keep(saved, tensor)

    def keep(self, saved: "_Saved", tensor: Tensor) -> None:
        """Fill `saved` with the 16-bit tensor behind `tensor`, or, if there is none, with itself."""
        half = tensor
        # a sparse tensor has no memory of its own, a nested one no strides
        is_dense = tensor.layout is torch.strided and not tensor.is_nested
        widened = self.by_memory.get(storage_id(tensor.untyped_storage())) if is_dense else None
        # one that has been changed is no longer what was widened; widening a tensor of inference mode, which has no
        # version to check in backward, leaves another version than 0 as well
        if widened is not None and tensor.dtype is torch.float32 and version_of(tensor) == 0:
            half, wide = widened
            saved.stride = wide.stride()
            if tensor is not wide and (tensor.stride() != saved.stride or tensor.shape != wide.shape):
                view = tensor.shape, tensor.stride(), int(tensor.storage_offset())
                if tensor.is_contiguous() and tensor.numel() < wide.numel() and half.stride() == saved.stride:
                    half = half.as_strided(view[0], view[1], half.storage_offset() + view[2])
                    saved.stride = view[1]
                else:
                    saved.view = view
        elif self.operand and tensor.dtype is torch.float32 and getattr(self.func, "__name__", None) in _MAY_COPY:
            copy = tensor.to(self.operand)
            if torch.equal(copy.float(), tensor):
                half, saved.stride = copy, copy.stride()
        if self.outer is None:
            saved.func, saved.kept, saved.version = self.func, half.detach(), version_of(half)
        else:
            saved.kept, saved.unpack_outer = self.outer[0](half), self.outer[1]


class _Saved:
    """What autograd keeps of one tensor: a 16-bit tensor and how to widen it, or the tensor itself."""

    kept: Any
    func: Callable[..., Any]
    version: int
    # of the widened tensor; None if `kept` was not widened
    stride: tuple[int, ...] | None = None
    # shape, stride and offset in the widened tensor of a view of it
    view: tuple[Sequence[int], Sequence[int], int] | None = None
    unpack_outer: Callable[[Any], Tensor] | None = None

    def unpack(self) -> Tensor:
        kept = self.kept
        if self.unpack_outer is not None:
            kept = self.unpack_outer(kept)
        elif version_of(kept) != self.version:
            self.complain()
        if self.stride is None:
            return kept
        wide = kept.float()
        if wide.stride() != self.stride:
            # an outer hook may bring another layout, and so does cloning
            wide = wide.new_empty_strided(wide.shape, self.stride).copy_(wide)
        return wide if self.view is None else wide.as_strided(*self.view)

    def complain(self) -> NoReturn:
        name = getattr(self.func, "__name__", self.func)
        raise OperationError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a {self.kept.dtype} tensor of shape {tuple(self.kept.shape)} that {name} saved for backward is at "
            f"version {version_of(self.kept)} instead of {self.version}; change a clone of it, or do so after backward"
        )


_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
# these lay an operand out anew where its strides do not fit, and save the copy
_MAY_COPY = frozenset(
    {"linear", "matmul", "__matmul__", "__rmatmul__", "linalg_matmul", "inner", "tensordot", "einsum"}
)
_PLAIN = frozenset({Tensor, nn.Parameter})


def _hooks_work_here() -> bool:
    # torch.func's transforms and disable_saved_tensors_hooks refuse them; torch.jit.trace would record them
    return can_hook_saved() and not in_transform() and not is_jit_tracing()


def _narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or tensor.dtype is dtype else tensor.to(dtype)


def _rounded(result: Any, dtype: torch.dtype | None) -> Any:
    """Round FP32 tensors; integers and FP64 stay what they are, as under autocast."""
    if dtype is None:
        return result
    if isinstance(result, Tensor):
        return result.to(dtype) if result.dtype == torch.float32 else result
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor, result)
