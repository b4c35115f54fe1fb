"""What the host learns of steps: whether schedulers may advance, and when a run that only skips has to end.

On a CPU it learns at once. On an accelerator it learns of a step when the next one begins, before that one updates: the
device has more work by then, so it never stands still, and every update has its right learning rate all the same.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from duotone.errors import DuotoneWarning, OptimizerError
from duotone.loss_scale import LossScale
from duotone.torch.distributed.agreement import Agreement
from duotone.torch.scaling.diagnosis import collapse, loss_at, non_finite_gradients, non_finite_loss
from duotone.torch.scaling.late import Late


class Outcome(NamedTuple):
    """What became of one step, as Python numbers, or as 0-d tensors that are still to arrive.

    Attributes:
        step: its number, from 1 on.
        loss_scale: that its gradients carried.
        skipped_in_a_row: steps skipped up to it; 0 if it was not.
        bad_loss: which of its losses, from 1 on, was the first that is not finite; 0 for none on this rank.
        bad_loss_anywhere: whether a loss was not finite on any rank.
        skipped_each: for each optimizer, whether it skipped.
    """

    step: int
    loss_scale: Any
    skipped_in_a_row: Any
    bad_loss: Any
    bad_loss_anywhere: Any
    skipped_each: Sequence[Any]


@dataclass
class _Course:
    """How those steps went that were of the same optimizers.

    A discriminator and a generator may take turns: then the one skips for ever, and the other never.

    Attributes:
        last: the last of them.
        skipped_in_a_row: how many of them were skipped up to it.
        overflows_in_a_row: the same, without those whose loss was not finite.
        is_checked: whether the last one has been looked at.
    """

    last: Outcome | None = None
    skipped_in_a_row: int = 0
    overflows_in_a_row: int = 0
    is_checked: bool = False


class Watch:
    """Follows the steps of a scaler.

    Args:
        patience: how many steps in a row may be skipped, or None.
    """

    def __init__(self, patience: int | None) -> None:
        self._patience = patience
        self._late = Late()
        self._step = 0
        self._waiting: list[tuple[int | None, Any]] = []
        self._course = _Course()
        # by weak references, which are equal if what they refer to is alive and the same
        self._courses: dict[tuple[Any, ...], _Course] = {}

    def follow(self, outcome: Outcome, schedulers: Any, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Take note of a step, and of the schedulers that are to advance if it was not skipped."""
        self._waiting = places_of(schedulers, optimizers)
        self._step = outcome.step
        key = tuple(map(ref, optimizers))
        if key not in self._courses:
            alive = {key: course for key, course in self._courses.items() if None not in [each() for each in key]}
            self._courses = {**alive, key: _Course()}
        self._course = self._courses[key]
        values = (
            outcome.loss_scale,
            outcome.skipped_in_a_row,
            outcome.bad_loss,
            outcome.bad_loss_anywhere,
            *outcome.skipped_each,
        )
        devices = {value.device for value in values if isinstance(value, Tensor)}
        if devices:
            self._late.send(torch.stack([_as_float64(value, *devices) for value in values]))
        else:
            self._learn(outcome)

    def settle(self) -> None:
        """Learn of the last step now: advance its schedulers, and say if a loss was not finite."""
        values = self._late.receive()
        if values is not None:
            scale, in_a_row, bad_loss, anywhere, *each = values
            self._learn(Outcome(self._step, scale, int(in_a_row), int(bad_loss), bool(anywhere), list(map(bool, each))))

    def check(
        self, settings: LossScale, optimizers: Sequence[torch.optim.Optimizer], agreement: Agreement | None
    ) -> None:
        """Raise if the last step of these optimizers was one skipped step too many, and gradients are not finite now.

        Raises:
            LossScaleCollapse: it was.
            NonFiniteLoss: it was, and its loss was not finite.
        """
        course = self._courses.get(tuple(map(ref, optimizers)))
        # whoever catches the error and goes on is not stopped by the same step again
        if course is None or course.last is None or course.is_checked or self._patience is None:
            return
        course.is_checked = True
        last, in_a_row = course.last, course.skipped_in_a_row
        if not in_a_row:
            return
        is_at_floor = settings.is_dynamic and last.loss_scale <= settings.min_scale and course.overflows_in_a_row > 1
        if last.bad_loss_anywhere:
            if in_a_row >= self._patience:
                raise non_finite_loss(last.step, last.bad_loss or None, in_a_row)
        elif is_at_floor or in_a_row >= self._patience:
            names, parameters = non_finite_gradients(optimizers, agreement)
            # one step late, the run may have recovered
            if names:
                raise collapse(names, parameters, in_a_row, last.loss_scale, settings)

    def _learn(self, outcome: Outcome) -> None:
        course = self._course
        is_news = outcome.bad_loss_anywhere and not (course.last is not None and course.last.bad_loss_anywhere)
        is_overflow = outcome.skipped_in_a_row and not outcome.bad_loss_anywhere
        course.last, course.is_checked = outcome, False
        # the scaler's count goes on from the run before, and ends with a step of other optimizers
        own = course.skipped_in_a_row + 1
        course.skipped_in_a_row = max(own, outcome.skipped_in_a_row) if outcome.skipped_in_a_row else 0
        course.overflows_in_a_row = course.overflows_in_a_row + 1 if is_overflow else 0
        waiting, self._waiting = self._waiting, []
        for place, scheduler in waiting:
            skipped = any(outcome.skipped_each) if place is None else outcome.skipped_each[place]
            if not skipped:
                scheduler.step()
        if is_news:
            became = ", the step was skipped" if outcome.skipped_in_a_row else ""
            warnings.warn(
                f"{loss_at(outcome.step, outcome.bad_loss or None)} is not finite: that is the forward pass and no "
                f"matter of a loss scale, which stays as it is{became}; said once until a loss is finite again",
                DuotoneWarning,
                stacklevel=6,
            )


def places_of(schedulers: Any, optimizers: Sequence[torch.optim.Optimizer]) -> list[tuple[int | None, Any]]:
    """Return each scheduler with the place of its optimizer among these; None if it says nothing of one.

    Args:
        schedulers: one, a list or tuple of several, or None.
        optimizers: those of a step.

    Raises:
        OptimizerError: one belongs to another optimizer, or needs a figure to advance.
    """
    several = () if schedulers is None else schedulers if isinstance(schedulers, list | tuple) else (schedulers,)
    return [(_place(scheduler, optimizers), scheduler) for scheduler in several]


def _place(scheduler: Any, optimizers: Sequence[torch.optim.Optimizer]) -> int | None:
    name = type(scheduler).__name__
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise OptimizerError(f"{name} advances by a figure of its own; call its step(figure) yourself")
    if not callable(getattr(scheduler, "step", None)):
        raise OptimizerError(f"a scheduler has a method step(), but {name} has none; give one, a list, or a tuple")
    own = getattr(scheduler, "optimizer", None)
    if own is None:
        return None
    for place, optimizer in enumerate(optimizers):
        # MasterWeights shares its groups with the optimizer in it, and one that prepare made with the one before
        if own is optimizer or own.param_groups is optimizer.param_groups:
            return place
    raise OptimizerError(
        f"this {name} changes the learning rate of an {type(own).__name__} that is not among the optimizers of this "
        "step; build it on one that is"
    )


def _as_float64(value: Any, device: torch.device) -> Tensor:
    # filled on the device: a copy from the host would wait for it
    return value.double() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)
