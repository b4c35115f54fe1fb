"""Who is told how a comparison goes: a view in the terminal, or nobody."""

from typing import Protocol

from duotone.compare.plan import Pace, Plan
from duotone.compare.records import Fit, Run, Trial


class Watcher(Protocol):
    """Is told of everything, in the process that was asked for the comparison, in the order in which it happens."""

    def begins(self, plan: Plan) -> None:
        """The comparison starts, or goes on."""

    def trial_begins(self, arm: str) -> None:
        """An arm is tried."""

    def trial_ends(self, trial: Trial) -> None:
        """It was, now or before an interruption."""

    def paced(self, pace: Pace, runs_left: int) -> None:
        """The number of steps is decided; so many runs are not finished yet."""

    def run_begins(self, arm: str, seed: int) -> None:
        """A process of its own builds its model."""

    def turn_ends(self, arm: str, seed: int, step: int, loss: float, step_seconds: float) -> None:
        """An arm has taken its turn; the loss is the turn's mean, the seconds its median."""

    def run_ends(self, run: Run) -> None:
        """It has, or it failed."""

    def fit_tried(self, arm: str, micro_batch: int, peak_bytes: int | None) -> None:
        """A micro-batch was measured; None if memory ran out."""

    def fit_ends(self, fit: Fit) -> None:
        """The largest is found."""


class Nobody(Watcher):
    """Is told of everything, and shows nothing."""
