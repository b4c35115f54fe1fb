"""What receives the events of a comparison: a view in the terminal, or one that shows nothing."""

from typing import Protocol

from duotone.compare.plan import Pace, Plan
from duotone.compare.records import Fit, Run, Trial


class Watcher(Protocol):
    """Receives every event, in the process that compares, in the order in which they happen."""

    def begins(self, plan: Plan) -> None:
        """The comparison starts, or goes on."""

    def trial_begins(self, arm: str) -> None:
        """The trial of an arm starts."""

    def trial_ends(self, trial: Trial) -> None:
        """It has ended, now or before an interruption."""

    def paced(self, pace: Pace, runs_left: int) -> None:
        """The number of steps is decided; so many runs are not finished yet."""

    def run_begins(self, arm: str, seed: int) -> None:
        """A process of its own builds its model."""

    def turn_ends(self, arm: str, seed: int, step: int, loss: float, step_seconds: float) -> None:
        """An arm has taken its turn; the loss is the turn's mean, the seconds its median."""

    def run_ends(self, run: Run) -> None:
        """It has ended, or failed."""

    def fit_tried(self, arm: str, micro_batch: int, peak_bytes: int | None) -> None:
        """A micro-batch was measured; None if memory ran out."""

    def fit_ends(self, fit: Fit) -> None:
        """The largest is found."""


class SilentWatcher(Watcher):
    """Shows nothing."""
