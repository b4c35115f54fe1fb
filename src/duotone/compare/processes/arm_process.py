"""An arm that trains with one seed in a process of its own, and its record once it has ended."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from duotone.compare.failures import WorkerFailed
from duotone.compare.job import Job
from duotone.compare.measuring.turn import Turn
from duotone.compare.plan import Pace
from duotone.compare.processes.process import Process
from duotone.compare.processes.run_record import not_finite, run_record
from duotone.compare.records import Failure, Run


class ArmProcess:
    """One job, trained turn by turn.

    Every method raises TaskError if the task is at fault; all else that goes wrong is the run's failure.

    Attributes:
        job: what it trains.
        run: its record, once it has ended; its process has ended then too.

    Args:
        job: what it trains.
        process: started, without a request so far.
        pace: how far it goes, and how many steps at a time.
        session: as in `Run`.
    """

    def __init__(self, job: Job, process: Process, pace: Pace, session: str = "") -> None:
        self.job = job
        self.run: Run | None = None
        self._process = process
        self._pace, self._session = pace, session
        self._turns: list[Turn] = []
        self._guarded(lambda: process.send("start", job))

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
        # a dead process does not answer
        with suppress(WorkerFailed):
            notes = self._process.ask("notes")
        run = run_record(
            self.job.arm.name, self.job.seed, self._turns, failure=failure, evaluation=evaluation, notes=notes
        )
        self.run = replace(run, session=self._session)
        self._process.end()
