"""One step with a loss scale: the inner optimizer's update or nothing at all, then the scale, then the record.

Three ways, because the backends have three. Where numbers can be read (torch always, the others outside of a program),
the host decides, and a skipped step costs nothing. In a program of TensorFlow a conditional decides, and so it does in
one of JAX for a CPU. In one of JAX for an accelerator the inner optimizer always runs, and each new value is chosen,
for there the host would have to wait to take a branch.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import keras

from duotone.keras import internals
from duotone.keras.backends import takes_branches
from duotone.keras.internals import ops
from duotone.keras.loss_scale import LEAVES, after_step, numbers, tensors
from duotone.keras.optim.gradients import Gradients
from duotone.keras.optim.step_record import overflows_at_floor
from duotone.loss_scale import update

# runs the inner optimizer, unless this bool, 0-d, is true
Run = Callable[[Any], None]


def step_on_host(optimizer: Any, gradients: Gradients, variables: Sequence[Any], loss_is_finite: Any) -> None:
    """Update, or skip, by what the host has read: no operation runs that is not needed."""
    settings, before, record = optimizer.settings, numbers(optimizer.scale_state), optimizer.record
    overflow = bool(ops.convert_to_numpy(gradients.non_finite).any())
    if not overflow:
        optimizer.inner_optimizer.apply(gradients.true, variables)
    is_finite = loss_is_finite is None or bool(ops.convert_to_numpy(loss_is_finite))
    after = update(settings, before, overflow, loss_is_finite=is_finite)
    for name in LEAVES:
        if getattr(after, name) != getattr(before, name):
            getattr(optimizer.scale_state, name).assign(getattr(after, name))
    record.last_scale.assign(before.scale)
    record.grad_norm.assign(gradients.grad_norm)
    # what was written at the last overflow stands until the step after the last of a row
    if overflow or before.skipped_in_a_row or not is_finite:
        at_floor = overflow and is_finite and settings.is_dynamic and before.scale <= settings.min_scale
        record.overflows_at_floor.assign(record.overflows_at_floor + 1 if at_floor else 0)
        record.loss_is_finite.assign(int(is_finite))
        record.non_finite.assign(_of_all(optimizer, gradients, variables))


def step_in_program(optimizer: Any, gradients: Gradients, variables: Sequence[Any], loss_is_finite: Any) -> None:
    """Update, or skip, without a number on the host."""
    finish(optimizer, gradients, variables, loss_is_finite, update_or_skip(optimizer, gradients, variables))


def update_or_skip(optimizer: Any, gradients: Gradients, variables: Sequence[Any]) -> Run:
    """Return what runs the inner optimizer in a program of this backend."""
    if keras.backend.backend() == "jax":
        return lambda overflow: _choose(optimizer, gradients, variables, overflow)
    inner = optimizer.inner_optimizer
    return lambda overflow: ops.cond(overflow, lambda: None, lambda: inner.apply(gradients.true, variables))


def finish(optimizer: Any, gradients: Gradients, variables: Sequence[Any], loss_is_finite: Any, run: Run) -> None:
    """Run the inner optimizer by `run`, and write the scale and the record, all in tensors."""
    settings, state, record = optimizer.settings, optimizer.scale_state, optimizer.record
    overflow = ops.any(gradients.non_finite)
    is_finite = ops.convert_to_tensor(True) if loss_is_finite is None else loss_is_finite
    before, at_floor = tensors(state), ops.copy(record.overflows_at_floor)
    run(overflow)
    after = after_step(settings, before, overflow, None if loss_is_finite is None else is_finite)
    for name in LEAVES:
        getattr(state, name).assign(getattr(after, name))
    record.last_scale.assign(before.scale)
    record.grad_norm.assign(gradients.grad_norm)
    record.loss_is_finite.assign(ops.cast(is_finite, "int32"))
    record.overflows_at_floor.assign(
        overflows_at_floor(settings, at_floor, before.scale, ops.logical_and(overflow, is_finite))
    )
    record.non_finite.assign(_of_all(optimizer, gradients, variables))


def _choose(optimizer: Any, gradients: Gradients, variables: Sequence[Any], overflow: Any) -> None:
    """Give each variable its new value or the old, in a program of JAX."""
    held = [*internals.trained_variables(optimizer), *optimizer.inner_optimizer.variables]
    before = [variable.value for variable in held]

    def updated() -> list[Any]:
        with keras.StatelessScope(list(zip(held, before, strict=True)), initialize_variables=False) as scope:
            optimizer.inner_optimizer.apply(gradients.true, variables)
        return [scope.get_current_value(variable) for variable in held]

    if takes_branches():
        # not cond(overflow, skip, update): then XLA copies every operand first, and a step takes twice as long
        after = ops.cond(ops.logical_not(overflow), updated, lambda: before)
    else:
        pairs = zip(before, updated(), strict=True)
        after = [new if new is old else ops.where(overflow, old, new) for old, new in pairs]
    for variable, new in zip(held, after, strict=True):
        variable.assign(new)


def _of_all(optimizer: Any, gradients: Gradients, variables: Sequence[Any]) -> Any:
    """Return the flags of all variables that an optimizer was built on: int32; 0 for those that were not given."""
    flags = ops.cast(gradients.non_finite, "int32")
    trained = internals.trained_variables(optimizer)
    if len(variables) == len(trained) and all(map(operator.is_, variables, trained)):
        return flags
    places = {internals.index_of(optimizer, variable): place for place, variable in enumerate(variables)}
    return ops.stack([flags[places[i]] if i in places else ops.zeros((), "int32") for i in range(len(trained))])
