"""What there is to see of a run, and who gets it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from duotone.torch.watching.callers import Caller


@dataclass(frozen=True)
class MixedOperands:
    """Operands of an elementwise kernel, one in 16 bits and one in FP32, whose result is FP32.

    Attributes:
        narrow: the dtype of the one in 16 bits.
        wide: the one in FP32.
        is_stream: whether both have the result's size.
        result_bytes: the result's size.
    """

    narrow: torch.dtype
    wide: Tensor
    is_stream: bool
    result_bytes: int


@dataclass
class Call:
    """A call of a torch function, filled in while it runs.

    Attributes:
        func: the function, or an aten operator that no function stands around.
        module: the path of the innermost module around it.
        autocast: whether torch.autocast was on when it was called.
        in_keep_float32: whether `keep_float32` is around it.
        is_narrow: whether it was given 16-bit operands and none in FP32.
        caller: who called it; None if no kernel ran.
        reads: dtypes of the floating-point tensors that its kernels read; of those with dimensions, if there are any.
        mixed: whether an elementwise kernel read several dtypes.
        mixed_operands: the first ones that were in 16 bits and in FP32.
        result: dtype of its first floating-point result.
    """

    func: Callable[..., Any]
    module: str
    autocast: bool = False
    in_keep_float32: bool = False
    is_narrow: bool = False
    caller: Caller | None = None
    reads: set[torch.dtype] = field(default_factory=set)
    mixed: bool = False
    mixed_operands: MixedOperands | None = None
    result: torch.dtype | None = None


class Observer(Protocol):
    """Gets what a watched run does, as it does it; nothing of a backward pass but the modules that it runs again.

    Attributes:
        running: paths of the modules that are running, the innermost last; kept by `watch`.
    """

    running: list[str]

    @property
    def module(self) -> str:
        """The path of the innermost module that is running, or a name for what is outside of all."""
        ...

    def add_inputs(self, path: str, inputs: Any) -> None:
        """A module was called."""

    def add_outputs(self, path: str, outputs: Any) -> None:
        """A module returned, or raised: then there are no outputs."""

    def add_call(self, call: Call) -> None:
        """A function of torch has ended."""

    def add_cast(self, source: Tensor, result: Tensor, call: Call | None, caller: Caller) -> None:
        """A kernel copied a floating-point tensor into another dtype, in a call or by itself."""

    def add_saved(self, tensor: Tensor) -> None:
        """Autograd keeps a tensor for the backward pass."""
