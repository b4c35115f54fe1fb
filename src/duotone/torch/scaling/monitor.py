"""What the host does with the outcome of a step: advances schedulers, warns of losses, ends a run that only skips.

On a CPU it has the outcome at once. On an accelerator it reads the outcome when the next step begins, before that one
updates: the device has more work queued by then, so it never stands still, and every update has its right learning rate
all the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import finalize, ref

import torch

from duotone.call_site import warn
from duotone.loss_scale import LossScale
from duotone.torch.distributed.agreement import Agreement
from duotone.torch.readback import Readback
from duotone.torch.scaling.diagnosis import collapse_error, loss_at, non_finite_gradients, non_finite_loss_error
from duotone.torch.scaling.outcome import Outcome
from duotone.torch.scaling.schedulers import Schedule, advance
from duotone.torch.watching.non_finite import NonFiniteSearch


@dataclass
class _History:
    """The steps so far of one set of optimizers.

    A discriminator and a generator may take turns: then the one skips for ever, and the other never.

    Attributes:
        last: the outcome of the last one.
        scale_before: the loss scale of the one before it.
        skipped_in_a_row: how many were skipped up to the last one.
        overflows_in_a_row: the same, without those whose loss was not finite.
        is_checked: whether `check` has looked at the last one.
    """

    last: Outcome | None = None
    scale_before: float = math.inf
    skipped_in_a_row: int = 0
    overflows_in_a_row: int = 0
    is_checked: bool = False

    def add(self, outcome: Outcome) -> None:
        """Add an outcome in Python numbers."""
        if outcome.skipped_in_a_row:
            # the scaler's count goes on from the run before, and ends with a step of other optimizers
            self.skipped_in_a_row = max(self.skipped_in_a_row + 1, outcome.skipped_in_a_row)
            self.overflows_in_a_row = 0 if outcome.any_non_finite_loss else self.overflows_in_a_row + 1
        else:
            self.skipped_in_a_row = self.overflows_in_a_row = 0
        self.scale_before = math.inf if self.last is None else self.last.loss_scale
        self.last, self.is_checked = outcome, False


class StepMonitor:
    """Follows the steps of a scaler.

    Args:
        patience: how many steps in a row may be skipped, or None for any number.

    Attributes:
        is_settled: whether no search for the loss scale goes on, as far as the host knows.
    """

    def __init__(self, patience: int | None) -> None:
        self.is_settled = False
        self._patience = patience
        self._readback = Readback()
        # the step that the host has yet to read: its outcome, schedules and history
        self._outstanding: tuple[Outcome, Sequence[Schedule], _History] | None = None
        # by weak references, which are equal if what they refer to is alive and the same
        self._histories: dict[tuple[Any, ...], _History] = {}
        self._search: NonFiniteSearch | None = None

    def record(
        self, outcome: Outcome, schedules: Sequence[Schedule], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Act on the outcome of a step of these optimizers: now, or, if it is on a device, when it is drained."""
        history = self._history_of(optimizers)
        if outcome.is_on_device:
            self._outstanding = outcome, schedules, history
            self._readback.send(outcome.to_tensor())
        else:
            self._act_on(outcome, schedules, history)

    def drain(self) -> None:
        """Act on the last step if that is outstanding: advance its schedulers, and warn if a loss was not finite."""
        values = self._readback.receive()
        if values is not None and self._outstanding is not None:
            outcome, schedules, history = self._outstanding
            self._outstanding = None
            self._act_on(outcome.with_values(values), schedules, history)

    def check(
        self, settings: LossScale, optimizers: Sequence[torch.optim.Optimizer], agreement: Agreement | None
    ) -> None:
        """Raise if the last step of these optimizers was one skipped step too many, and gradients are not finite now.

        Raises:
            LossScaleCollapse: it was.
            NonFiniteLoss: it was, and its loss was not finite.
        """
        history = self._histories.get(tuple(map(ref, optimizers)))
        # whoever catches the error and goes on is not stopped by the same step again
        if history is None or history.last is None or history.is_checked or self._patience is None:
            return
        history.is_checked = True
        last, in_a_row = history.last, history.skipped_in_a_row
        if not in_a_row:
            return
        # two in a row: a search for the scale begins there, and one batch alone may be at fault
        largest = max(last.loss_scale, history.scale_before)
        is_at_floor = settings.is_dynamic and largest <= settings.min_scale and history.overflows_in_a_row > 1
        if last.any_non_finite_loss:
            if in_a_row >= self._patience:
                raise non_finite_loss_error(last.step, last.non_finite_loss or None, in_a_row, self._end_search())
        elif is_at_floor or in_a_row >= self._patience:
            names, parameters = non_finite_gradients(optimizers, agreement)
            # one step later, the run may have recovered
            if names:
                raise collapse_error(names, parameters, in_a_row, last.loss_scale, settings)

    def _end_search(self) -> str | None:
        search, self._search = self._search, None
        return None if search is None else search.end()

    def _history_of(self, optimizers: Sequence[torch.optim.Optimizer]) -> _History:
        key = tuple(map(ref, optimizers))
        if key not in self._histories:
            alive = {key: history for key, history in self._histories.items() if None not in [each() for each in key]}
            self._histories = {**alive, key: _History()}
        return self._histories[key]

    def _act_on(self, outcome: Outcome, schedules: Sequence[Schedule], history: _History) -> None:
        was_finite = history.last is None or not history.last.any_non_finite_loss
        history.add(outcome)
        self.is_settled = outcome.search == 0
        advance(schedules, outcome.skipped_each)
        if not outcome.any_non_finite_loss:
            self._end_search()
        elif self._search is None and self._patience is not None and history.skipped_in_a_row >= self._patience - 2:
            # the error is near: the forward passes until then say where the value is from
            self._search = NonFiniteSearch()
            # modules outlive a scaler that nobody holds any more
            finalize(self, self._search.end)
        if outcome.any_non_finite_loss and was_finite:
            consequence = ", the step was skipped" if outcome.skipped_in_a_row else ""
            warn(
                f"{loss_at(outcome.step, outcome.non_finite_loss or None)} is not finite: that is the forward pass and "
                f"no matter of a loss scale, which stays as it is{consequence}; said once until a loss is finite again",
            )
