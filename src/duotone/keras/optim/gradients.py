"""What the gradients of a scaled loss are: the true ones in FP32, their norm, and which of them are not finite.

    true = scaled / scale        grad_norm = sqrt(sum(true^2))

Gradients of FP64 variables stay FP64. Variables that are overwritten with their gradient, as those of FP8 layers, have
no scaled one: theirs passes as it is, counts as an overflow where it is not finite, and is no part of the norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from duotone.keras.internals import ops
from duotone.keras.optim.slices import distinct_values, on_values


@dataclass(frozen=True)
class Gradients:
    """The gradients of one step.

    Attributes:
        true: what the inner optimizer is to see, one for each variable; None where there is none.
        non_finite: bool, one for each variable: whether its true gradient holds an Inf or a NaN.
        grad_norm: float32, 0-d: the norm of all true gradients; not finite after an overflow.
    """

    true: list[Any]
    non_finite: Any
    grad_norm: Any


def is_overwritten(variable: Any) -> bool:
    """Return whether a variable takes its gradient as its next value."""
    return getattr(variable, "overwrite_with_gradient", False)


def true_gradients(scaled: Sequence[Any], variables: Sequence[Any], scale: Any) -> list[Any]:
    """Return the true gradients, in FP32 or FP64; `scale` is None where nothing was scaled."""

    def true(values: Any) -> Any:
        wide = ops.cast(values, keras.backend.result_type(values.dtype, "float32"))
        return wide if scale is None else wide / ops.cast(scale, wide.dtype)

    return [
        gradient if gradient is None or is_overwritten(variable) else on_values(true, gradient)
        for gradient, variable in zip(scaled, variables, strict=True)
    ]


def measured(true: list[Any], variables: Sequence[Any]) -> Gradients:
    """Return true gradients with what they are like; each is read once where a compiler joins reads."""
    non_finite, squares = [], []
    for gradient, variable in zip(true, variables, strict=True):
        if gradient is None:
            non_finite.append(ops.convert_to_tensor(False))
            continue
        values = distinct_values(gradient)
        non_finite.append(ops.logical_not(ops.all(ops.isfinite(values))))
        if not is_overwritten(variable):
            squares.append(ops.cast(ops.sum(ops.square(values)), "float32"))
    norm = ops.sqrt(ops.sum(ops.stack(squares))) if squares else ops.zeros((), "float32")
    return Gradients(true, ops.stack(non_finite), norm)
