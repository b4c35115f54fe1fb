"""What the last step of an optimizer with a loss scale did: in variables, and as numbers of the host."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from duotone.keras.internals import ops
from duotone.loss_scale import LossScale


@dataclass(frozen=True)
class StepReport:
    """What the last step did, in numbers of the host.

    Attributes:
        loss_scale: the scale that the loss was multiplied by; before the first step, that it will be.
        skipped: steps skipped since the start, because a gradient was Inf or NaN.
        skipped_in_a_row: steps skipped since the last one that was not.
        grad_norm: the norm of the true gradient, before clipping; not finite if the step was skipped.
        loss_is_finite: whether the last loss was a finite number before it was scaled; True where that is not known.
        overflows_at_floor: the last steps in a row that overflowed at the lowest loss scale.
    """

    loss_scale: float
    skipped: int = 0
    skipped_in_a_row: int = 0
    grad_norm: float = 0.0
    loss_is_finite: bool = True
    overflows_at_floor: int = 0


@dataclass(frozen=True)
class StepRecord:
    """The variables that say what the last step did, beside the counts of the loss scale; named as in `StepReport`.

    Attributes:
        last_scale: float32, 0-d.
        grad_norm: float32, 0-d.
        loss_is_finite: int32, 0-d: 0 or 1.
        overflows_at_floor: int32, 0-d.
        non_finite: int32, one for each trainable variable: 1 if its last gradient was not finite.
    """

    last_scale: Any
    grad_norm: Any
    loss_is_finite: Any
    overflows_at_floor: Any
    non_finite: Any


def create_record(settings: LossScale, variables: int, add_variable: Callable[..., Any]) -> StepRecord:
    """Return the record before the first step, in variables that an optimizer's `add_variable` makes."""

    def create(name: str, dtype: str, start: float = 0, shape: tuple[int, ...] = ()) -> Any:
        return add_variable(
            shape=shape,
            initializer=keras.initializers.Constant(start),
            dtype=dtype,
            aggregation="only_first_replica",
            name=name,
        )

    return StepRecord(
        last_scale=create("last_scale", "float32", settings.init_scale),
        grad_norm=create("grad_norm", "float32"),
        loss_is_finite=create("loss_is_finite", "int32", 1),
        overflows_at_floor=create("overflows_at_floor", "int32"),
        non_finite=create("non_finite", "int32", shape=(variables,)),
    )


def overflows_at_floor(settings: LossScale, before: Any, scale: Any, overflow: Any) -> Any:
    """Return how many steps in a row have overflowed where the scale can fall no further; 0 if it cannot move.

    Args:
        settings: of the loss scale.
        before: the count before the step.
        scale: of the step.
        overflow: whether it overflowed, and its loss was finite.
    """
    if not settings.is_dynamic:
        return before
    return ops.where(ops.logical_and(overflow, scale <= settings.min_scale), before + 1, before * 0)
