"""FP16 storage with FP32 arithmetic on CPUs that have no FP16 matrix product.

Such CPUs emulate FP16 products several times slower than FP32 ones. Here the operands of a product, a convolution
or an attention are rounded to FP16, widened, multiplied in FP32 and the result rounded once to FP16, which is what a
tensor core does. Autograd sees the conversions, so the backward products take the same way without any mode.
It saves the operands in 16 bits, and widens them again for backward: hooks on saved tensors know a widened operand by
its memory. Left out: the FP32 values inside a function of several steps (a recurrent network's gates, the projections
of `multi_head_attention_forward`), which are saved in FP32, and torch.compile, torch.func and tensor subclasses,
which take the same numbers without the hooks.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duotone.errors import OperationError
from duotone.torch.call_site import warn
from duotone.torch.internals.autograd import (
    can_hook_saved,
    in_transform,
    is_jit_tracing,
    pop_saved_hooks,
    push_saved_hooks,
    top_saved_hooks,
    version_of,
)
from duotone.torch.internals.dispatch import has_half_products, without_autocast
from duotone.torch.internals.tensors import storage_id
from duotone.torch.nested import map_tensors


def cpu_has_half_products() -> bool:
    """Return whether this CPU multiplies matrices in FP16 itself."""
    return has_half_products()


@functools.cache
def say_once_how_half_runs_on_cpu() -> None:
    """Warn, the first time, if FP16 products on this CPU run in FP32 arithmetic."""
    if not cpu_has_half_products():
        warn(
            "this CPU has no FP16 matrix products: they run in FP32 arithmetic on FP16 values, at FP32's speed; "
            'policy "bf16" is the faster choice where the CPU has BF16',
        )


def multiply_in_float32(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function on operands rounded to FP16 and widened to FP32, and round its FP32 results to FP16.

    Rounding is to nearest even: NaN stays NaN, +-0 and subnormals are kept, beyond 65504 lies Inf. A call with `out=`
    is left alone, as under autocast.

    Args:
        func: a product, a convolution, an attention, a recurrent network, ...; it changes no operand in place.
        args: its arguments, nested in tuples, lists and dicts; FP32, BF16 and FP16 tensors are operands, others stay.
        kwargs: its named arguments.

    Returns:
        What `func` returns, FP32 tensors in it as FP16.

    Raises:
        OperationError: (a `RuntimeError`) in backward, if a 16-bit operand was changed in place since.

    >>> ones = torch.ones(1, 4096, dtype=torch.float16)
    >>> multiply_in_float32(torch.matmul, (ones, ones.T), {})
    tensor([[4096.]], dtype=torch.float16)
    """
    if kwargs.get("out") is not None:
        return func(*args, **kwargs)
    if torch.compiler.is_compiling():
        # the compiler follows conversions, not hooks; it widens again in backward by itself
        with torch.autocast("cpu", enabled=False):
            wide_args, wide_kwargs = map_tensors(_widen, (args, dict(kwargs)))
            return map_tensors(_round, func(*wide_args, **wide_kwargs))
    call = _Call(func)
    # several times cheaper than torch.autocast, but the compiler does not know it
    with without_autocast():
        try:
            return call.run(args, kwargs)
        finally:
            # autograd keeps the hook, and with it the call, as long as what the hook saved
            call.forget()


class _Call:
    """One call: which FP32 tensor was widened from which 16-bit one, and what of it is saved for backward."""

    __slots__ = ("by_memory", "by_operand", "func", "hookable", "needs_grad", "outer", "waiting")

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
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
            return _rounded(self.func(*wide_args, **wide_kwargs))

        # autograd calls the innermost hooks only, so those of checkpointing or offloading are called from ours
        self.outer = top_saved_hooks(False)
        if self.func is F.scaled_dot_product_attention:
            self.waiting = []
        push_saved_hooks(self.pack, _Saved.unpack)
        try:
            result = self.func(*wide_args, **wide_kwargs)
        finally:
            pop_saved_hooks()
        rounded = _rounded(result)
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
        if tensor.dtype not in _FLOATS:
            return tensor
        # self-attention is known by its query, key and value being one object
        wide = self.by_operand.get(id(tensor))
        if wide is not None:
            return wide
        half = tensor if tensor.dtype is torch.float16 else tensor.half()
        wide = self.by_operand[id(tensor)] = half.float()
        if wide.requires_grad:
            self.needs_grad = True
        if self.hookable:
            if type(tensor) in _PLAIN and tensor.layout is torch.strided and tensor.is_cpu:
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
        """Let flash attention save its result as FP16 flash attention does: rounded, in memory that is there anyway."""
        waiting, self.waiting = self.waiting, None
        if result.dtype is torch.float32 and result.numel() * 4 == result.untyped_storage().nbytes():
            # a result that hooks outside keep would hold its own history, which holds it
            self.by_memory[storage_id(result.untyped_storage())] = rounded.detach(), result
        for saved, tensor in waiting or ():
            self.keep(saved, tensor)

    def keep(self, saved: "_Saved", tensor: Tensor) -> None:
        """Fill `saved` with the 16-bit tensor behind `tensor`, or, if there is none, with itself."""
        half = tensor
        widened = self.by_memory.get(storage_id(tensor.untyped_storage()))
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
        elif tensor.dtype is torch.float32 and getattr(self.func, "__name__", None) in _MAY_COPY:
            copy = tensor.half()
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


def _widen(tensor: Tensor) -> Tensor:
    return tensor.half().float() if tensor.dtype in _FLOATS else tensor


def _round(tensor: Tensor) -> Tensor:
    # integers and FP64 stay what they are, as under autocast
    return tensor.half() if tensor.dtype == torch.float32 else tensor


def _rounded(result: Any) -> Any:
    return _round(result) if isinstance(result, Tensor) else map_tensors(_round, result)
