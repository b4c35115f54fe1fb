"""Epochs that trained nothing do not count for callbacks that count epochs.

Schedules of steps, `keras.optimizers.schedules`, go by the optimizer's `iterations`, which a skipped step does not
move. Callbacks go by epochs: `LearningRateScheduler` by their number, `ReduceLROnPlateau` and `EarlyStopping` by how
many passed without an improvement. Each epoch whose every step was skipped is taken out of these counts, and the
learning rate is what it was before it. Nothing of a callback is replaced for longer than a hook of the list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from duotone.keras.report.reading import Reading, number


@dataclass(frozen=True)
class _Earlier:
    """A user's schedule, asked for an earlier epoch."""

    schedule: Callable[..., Any]
    epochs: int

    def __call__(self, epoch: int, *learning_rate: float) -> Any:
        return self.schedule(epoch - self.epochs, *learning_rate)


class EpochHold:
    """Holds what the callbacks of a list count.

    It must be called before these callbacks are.

    Args:
        callbacks: all of a list.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._schedulers = [each for each in callbacks if isinstance(each, keras.callbacks.LearningRateScheduler)]
        waits = keras.callbacks.EarlyStopping, keras.callbacks.ReduceLROnPlateau
        self._waiting: list[Any] = [each for each in callbacks if isinstance(each, waits)]
        self._held = 0
        self._trained = True
        self._learning_rate: float | None = None
        self._shifted: list[tuple[Any, Callable[..., Any]]] = []

    def begin_epoch(self, optimizer: Any) -> None:
        """Take back the learning rate if the last epoch trained nothing, and let schedules see an earlier epoch."""
        if not (self._schedulers or self._waiting):
            return
        if not self._trained and number(optimizer.learning_rate) != self._learning_rate:
            optimizer.learning_rate = self._learning_rate
        self._learning_rate = number(optimizer.learning_rate)
        if self._held:
            self._shifted = [(each, each.schedule) for each in self._schedulers]
            for each, schedule in self._shifted:
                each.schedule = _Earlier(schedule, self._held)

    def begin_training(self) -> None:
        """Give the callbacks their own schedules back, now that they have asked them."""
        for each, schedule in self._shifted:
            each.schedule = schedule
        self._shifted = []

    def end_epoch(self, epoch: int, before: Reading, after: Reading, logs: dict[str, Any]) -> None:
        """Take one from what the callbacks count, if nothing was trained; each of them is about to add one.

        Args:
            epoch: its number, from 0 on.
            before: the reading before the epoch.
            after: that after it.
            logs: the epoch's.
        """
        self._trained = not _trained_nothing(before, after)
        if self._trained:
            return
        self._held += 1
        for each in self._waiting:
            if each.monitor not in logs or epoch < getattr(each, "start_from_epoch", 0):
                continue
            if getattr(each, "cooldown_counter", 0) > 0:
                each.cooldown_counter += 1
            else:
                # a patience of 0 ends as soon as 0 is reached
                each.wait = each.wait - 1 if each.patience > 0 else -2


def _trained_nothing(before: Reading, after: Reading) -> bool:
    if after.step is None:
        return False
    skipped_before = 0 if before.step is None else before.step.skipped
    # iterations stand still in an epoch that only accumulates gradients, too
    return after.step.skipped > skipped_before and after.iterations == before.iterations
