"""What an update reads and writes: one operand per parameter, one set of settings per parameter group."""

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
        moments: FP32 or BF16 tensors shaped like the weight, in the optimizer's order; read and written.
        step: int64, 0-d: how often the parameter has been updated; read and written.
        beta_products: FP64, shape `(2,)`, the running products of AdamW's betas; None in other updates.
        rounding: how a 16-bit weight without a tail is rounded; without meaning for the others.
        number: the parameter's place in its optimizer, from 0 on; random bits depend on it.
        group: which of the settings hold.
    """

    weight: Tensor
    tail: Tensor | None
    grad: Tensor
    moments: tuple[Tensor, ...]
    step: Tensor
    beta_products: Tensor | None
    rounding: Rounding
    number: int
    group: int


class Batch(Sequence[Operand]):
    """The operands of one step, contiguous, of which all but the gradients are the same in many steps.

    Args:
        operands: the operands, their gradients left out as None.
        grads: their gradients in this step, of the same dtypes in all of these steps, at whatever addresses.
        noted: what is known already of these operands, but for where gradients lie; written to.
    """

    def __init__(self, operands: Sequence[Operand], grads: Sequence[Tensor], noted: dict[str, Any]) -> None:
        self._operands = operands
        self.grads = grads
        self.noted = noted

    def __len__(self) -> int:
        return len(self._operands)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return list(self)[place]
        return self._operands[place]._replace(grad=self.grads[place])


class AdamWSettings(NamedTuple):
    """Hyper-parameters of `adamw` for one parameter group, as in torch; `seed` is that of the random bits."""

    lr: Scalar
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    seed: int


class SGDSettings(NamedTuple):
    """Hyper-parameters of `sgd` for one parameter group, as in torch; `seed` is that of the random bits."""

    lr: Scalar
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    seed: int


class LionSettings(NamedTuple):
    """Hyper-parameters of `lion` for one parameter group; `seed` is that of the random bits."""

    lr: Scalar
    beta1: float
    beta2: float
    weight_decay: float
    maximize: bool
    seed: int
