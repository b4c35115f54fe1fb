"""One copy in 16 bits for all products that take the same FP32 tensor: queries, keys and values of an FP32 stream.

Each product has a cast of its own in autograd's graph, so that its gradient is widened before gradients are added, in
FP32, as without sharing; what they share is the memory of the first, which autograd keeps for the backward pass. Only
the last operand is remembered, by weak references to it and to its copy and by how often it was written to: nothing is
kept alive, and where the first product has kept nothing, as without gradients or inside of a checkpointed part, the
next one has a copy of its own. Once code has asked for a tensor's memory (`x.data`, `x.numpy()`), in which it may write
without being counted, nothing more is shared until the region ends. Left out: weights, inputs and whatever else has no
history in autograd's graph, transforms of torch.func, and torch.compile, whose compiler finds equal casts itself.
"""

import threading
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from duotone.torch.internals.autograd import VERSION, transforms_are_active
from duotone.torch.internals.dispatch import mode_count

# elements from which on a copy is worth the search for it
LEAST = 1024
# what shows others the memory of a tensor, in which they may write without being counted; and what kernels ask for, or
# whoever gathers and frees weights, and keeps for no longer than a call
_SHOWING = ("numpy", "set_", "__array__", "__dlpack__")
_SHOWING_FOR_A_CALL = ("data_ptr", "untyped_storage", "storage")


class SharedCast(threading.local):
    """Casts operands of products to a dtype of 16 bits, for each thread by itself.

    Args:
        dtype: BF16 or FP16.

    >>> cast, weight = SharedCast(torch.bfloat16), torch.ones(32, 32).bfloat16().requires_grad_()
    >>> x = weight.float()
    >>> first = cast(x)
    >>> results = [first @ weight, cast(x) @ weight]
    >>> cast(x).data_ptr() == first.data_ptr(), cast(x.add_(1)).data_ptr() == first.data_ptr()
    (True, False)
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        # the last operand, how often it was written to, its copy, and the stream that made it
        self._last: tuple[ref[Tensor], Any, ref[Tensor], int] | None = None
        # whether somebody has been shown the memory of a tensor
        self._is_shown = False

    def __call__(self, operand: Tensor, *, by_autocast: bool = False) -> Tensor:
        """Return an FP32 tensor in 16 bits, rounded to nearest even, in memory that it may share.

        Called where no function mode is on, for many products: what costs a call is asked last.

        Args:
            operand: what a product takes.
            by_autocast: whether autocast is to cast it if this does not; then it is returned as it is where autocast
                is off, or casts to another dtype, and where it is small.
        """
        if by_autocast:
            device_type = operand.device.type
            is_on = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) is self._dtype
            if operand.numel() < LEAST or not is_on:
                return operand
        cast = operand.to(self._dtype)
        if (
            operand.is_leaf
            or self._is_shown
            or not (operand.is_cpu or operand.is_cuda)
            # others may be made of several tensors
            or type(operand) is not Tensor
            or operand.layout is not torch.strided
            or operand.is_nested
        ):
            return cast
        # without a count of writes, nothing is shared
        version = getattr(operand, VERSION, None)
        # what another stream makes may not be there yet
        stream = torch.cuda.current_stream(operand.device).cuda_stream if operand.is_cuda else 0
        last = self._last
        if last is not None and last[0]() is operand and last[1] == version is not None and last[3] == stream:
            first = last[2]()
            if first is not None:
                if operand.numel() >= LEAST and torch.is_grad_enabled() and not transforms_are_active():
                    cast.data = first
                return cast
        self._last = ref(operand), version, ref(cast), stream
        return cast

    def end_region(self) -> None:
        """Forget the last operand: what is outside of regions is not seen. A mode is entered no more, or others are."""
        self._last = None
        if mode_count() == 0:
            self._is_shown = False

    def show(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Call what lets others write into a tensor without being counted, now or later, as a handler does."""
        # copies of weights are never shared
        if type(args[0]) is not nn.Parameter:
            self._last, self._is_shown = None, True
        return func(*args, **kwargs)

    def show_for_a_call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Call what lets others write into a tensor without being counted, now, as a handler does."""
        self._last = None
        return func(*args, **kwargs)

    def handlers(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """Return the handlers of torch's functions that show others a tensor's memory, as modes see them."""
        data: Any = Tensor.data
        showing = [getattr(Tensor, name) for name in _SHOWING]
        return {
            **dict.fromkeys([*showing, data.__get__, data.__set__], self.show),
            **{getattr(Tensor, name): self.show_for_a_call for name in _SHOWING_FOR_A_CALL},
        }
