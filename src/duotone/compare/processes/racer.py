"""One entry while it is trained: its process, the turns it has taken, and its record once it has ended."""

from collections.abc import Callable
from contextlib import suppress

from duotone.compare.entry import Entry
from duotone.compare.failures import WorkerFailed
from duotone.compare.measuring.turn import Turn
from duotone.compare.plan import Pace
from duotone.compare.processes.ledger import not_finite, run_of
from duotone.compare.processes.process import Process
from duotone.compare.records import Failure, Run


class Racer:
    """An arm that trains with one seed.

    Every method raises TaskError if the task is at fault; all else that goes wrong is the run's failure.

    Attributes:
        entry: what it trains.
        run: its record, once it has ended; its process has ended then too.

    Args:
        entry: what it trains.
        process: that has started and was asked nothing yet.
        pace: how far it goes, and how many steps at a time.
    """

    def __init__(self, entry: Entry, process: Process, pace: Pace) -> None:
        self.entry = entry
        self.run: Run | None = None
        self._process = process
        self._pace = pace
        self._turns: list[Turn] = []
        self._guarded(lambda: process.send("start", entry))

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return sum(len(turn.steps) for turn in self._turns)

    def wait(self) -> None:
        """Wait until its model is built."""
        self._guarded(self._process.receive)

    def take_turn(self) -> Turn | None:
        """Take a turn, and evaluate after the last; return the turn unless there was none."""
        before = len(self._turns)
        self._guarded(self._take)
        return self._turns[-1] if len(self._turns) > before else None

    def _take(self) -> None:
        left = self._pace.steps - self.step
        # a last turn of one step would be timed with cold caches
        steps = left if left <= self._pace.turn_steps + 1 else self._pace.turn_steps
        turn: Turn = self._process.ask("take", steps)
        self._turns.append(turn)
        failure = turn.failure or not_finite(self._turns)
        if failure is not None:
            raise WorkerFailed(failure)
        if self.step == self._pace.steps:
            evaluation = self._process.ask("evaluate")
            self._end(evaluation=evaluation)

    def _guarded(self, action: Callable[[], object]) -> None:
        if self.run is not None:
            return
        try:
            action()
        except WorkerFailed as error:
            self._end(failure=error.failure)

    def _end(self, *, failure: Failure | None = None, evaluation: dict[str, float] | None = None) -> None:
        notes: tuple[str, ...] = ()
        # a dead one tells nothing more
        with suppress(WorkerFailed):
            notes = self._process.ask("notes")
        self.run = run_of(
            self.entry.arm.name, self.entry.seed, self._turns, failure=failure, evaluation=evaluation, notes=notes
        )
        self._process.end()
