"""What an update, or an average, reads and writes: one operand per parameter."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from torch import Tensor

Scalar = float | Tensor


class Rounding(StrEnum):
    """How an updated FP32 value becomes a 16-bit weight that has no master."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


class Operand(NamedTuple):
    """One parameter of an update, all of its tensors on one device and in one memory layout.

    Attributes:
        weight: the resident weight in FP32, BF16 or FP16; read and written.
        tail: int16, shaped like the weight, or None where the weight is FP32 or has no master; read and written.
        grad: the scaled gradient in FP32, BF16 or FP16, shaped like the weight; read.
        moments: FP32 or BF16 tensors shaped like the weight, in the order of the update's slots; read and written.
        step: int64, 0-d: how often the parameter has been updated; read and written.
        counters: FP64, 1-d, what else an update counts; None where it counts nothing; read and written.
        rounding: how a 16-bit weight without a tail is rounded; without meaning for the others.
        number: the parameter's index in its optimizer, from 0 on; random bits depend on it.
        group: which of the settings hold.
        checksums: int32, of the weight as the last step has left it (`checksums`), or None where there is no tail, or
            nothing to compare with; read and written.
    """

    weight: Tensor
    tail: Tensor | None
    grad: Tensor
    moments: tuple[Tensor, ...]
    step: Tensor
    counters: Tensor | None
    rounding: Rounding
    number: int
    group: int
    checksums: Tensor | None = None


class Edits(NamedTuple):
    """Where a step notes that it has found weights changed since the last one.

    Attributes:
        seen: int32, 0-d, on the operands' device; `mark` is set in it, as it is behind a parameter's own checksums.
        mark: the bit of this step.
    """

    seen: Tensor
    mark: int


class AverageOperand(NamedTuple):
    """One tensor whose average is kept, all of it on one device and of one shape.

    Attributes:
        weight: in FP32, BF16 or FP16; read.
        tail: int16, or None where the weight is FP32 or has no master; read.
        average: FP32; read and written.
    """

    weight: Tensor
    tail: Tensor | None
    average: Tensor


class AverageBatch(NamedTuple):
    """All averages on one device.

    Attributes:
        operands: these.
        cache: what was derived from them; written to.
    """

    operands: tuple[AverageOperand, ...]
    cache: dict[str, Any]


class Batch(Sequence[Operand]):
    """The operands of one step, contiguous, of which all but the gradients are the same in many steps.

    Args:
        operands: the operands, their gradients left out as None.
        grads: their gradients in this step, of the same dtypes in all of these steps, at whatever addresses.
        cache: what was derived from these operands, but for where gradients lie; written to.
    """

    def __init__(self, operands: Sequence[Operand], grads: Sequence[Tensor], cache: dict[str, Any]) -> None:
        self._operands = operands
        self.grads = grads
        self.cache = cache

    def __len__(self) -> int:
        return len(self._operands)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        return self._operands[index]._replace(grad=self.grads[index])
