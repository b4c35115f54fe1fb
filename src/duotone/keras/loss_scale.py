"""A loss scale in Keras variables: the state of `duotone.loss_scale` as leaves that Keras saves, loads and distributes.

The transition is `duotone.loss_scale.update`, the same for every framework. Where a step is traced, it is computed by
Keras' operations and without a branch; where the host waits for the gradients in any case, by Python numbers.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import keras

from duotone.errors import LossScaleError
from duotone.keras.internals import ops
from duotone.loss_scale import LossScale, LossScaleState, init_state, update
from duotone.policy import Policy

LEAVES = tuple(field.name for field in fields(LossScaleState))


def read_settings(policy: LossScale | Policy | str) -> LossScale:
    """Return the settings of the loss scale that a policy, its text or the settings themselves mean.

    Raises:
        PolicyError: the text cannot be read.
        LossScaleError: it is none of the three.

    >>> read_settings("fp16-mixed,loss_scale=1024") == LossScale.static(1024)
    True
    >>> read_settings("bf16").is_none
    True
    """
    if isinstance(policy, LossScale):
        return policy
    if not isinstance(policy, Policy | str):
        raise LossScaleError(
            f"a loss scale is given by a policy's text, a Policy or a LossScale, not {policy!r}; write "
            'LossScaleOptimizer(optimizer, "fp16-mixed") or LossScaleOptimizer(optimizer, LossScale(init_scale=1024))'
        )
    return LossScale.parse(Policy.parse(policy).loss_scale)


def create_state(settings: LossScale, add_variable: Callable[..., Any]) -> LossScaleState:
    """Return the state before the first step, in variables that an optimizer's `add_variable` makes.

    FP32 for the scale and int32 for the rest, whatever Keras' default format is.
    """
    start = init_state(settings)
    return LossScaleState(
        **{
            name: add_variable(
                shape=(),
                initializer=keras.initializers.Constant(getattr(start, name)),
                dtype="float32" if name == "scale" else "int32",
                aggregation="only_first_replica",
                # as Keras names it
                name="dynamic_scale" if name == "scale" else name,
            )
            for name in LEAVES
        }
    )


def tensors(variables: LossScaleState) -> LossScaleState:
    """Return the leaves' present values, as tensors."""
    # a copy: what TensorFlow converts is the variable itself, read where it is used
    return LossScaleState(**{name: ops.copy(getattr(variables, name)) for name in LEAVES})


def numbers(variables: LossScaleState) -> LossScaleState:
    """Return the leaves' present values, as Python numbers; it waits for the device."""
    return LossScaleState(**{name: ops.convert_to_numpy(getattr(variables, name).value).item() for name in LEAVES})


def after_step(
    settings: LossScale, state: LossScaleState, found_inf: Any, loss_is_finite: Any | None = None
) -> LossScaleState:
    """Return the state after one step, in tensors; a trace of it has no branch.

    Args:
        settings: how the scale moves.
        state: tensors, as `tensors` returns them.
        found_inf: bool, 0-d: whether the gradients held an Inf or a NaN.
        loss_is_finite: bool, 0-d: whether the loss was a finite number before it was scaled; None for yes.
    """
    # TensorFlow compares no bool with 0
    is_finite = True if loss_is_finite is None else ops.cast(loss_is_finite, "int32")
    return update(settings, state, ops.cast(found_inf, "int32"), loss_is_finite=is_finite, where=_where)


def _where(condition: Any, if_true: Any, if_false: Any) -> Any:
    """Return the choice of two tensors, or of a tensor and a Python number, in the tensor's dtype."""
    dtype = next(value.dtype for value in (if_true, if_false) if hasattr(value, "dtype"))
    dtype = keras.backend.standardize_dtype(dtype)
    return ops.where(condition, ops.convert_to_tensor(if_true, dtype), ops.convert_to_tensor(if_false, dtype))
