"""Processes that train, for the one that compares: start them, send requests, notice their death, end them.

Each is new ("spawn"), so that no arm inherits another's libraries, threads or memory. All of them end with the `with`
block, whatever ends it.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from typing import Any

from duotone.compare.failures import WorkerFailed, failure_of_death
from duotone.compare.processes.worker import work
from duotone.errors import TaskError

# how often it is checked that a process without an answer so far is alive; an answer is received at once
_CHECK_SECONDS = 0.5
_PATIENCE_SECONDS = 5.0


class Process:
    """A process of its own, and the pipe to it.

    Args:
        log: where it prints to.
    """

    def __init__(self, log: Path) -> None:
        context = get_context("spawn")
        self._log = log
        self._connection, self._theirs = context.Pipe()
        # not a daemon: a task may have processes of its own, which read its data
        self._process = context.Process(target=work, args=(self._theirs, log, time.time()))

    @property
    def pid(self) -> int | None:
        """Its number; None before it is started."""
        return self._process.pid

    def start(self) -> None:
        """Start it."""
        with _without_interrupts():
            self._process.start()
        # with this end open here too, its death would go unnoticed
        self._theirs.close()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Return its answer to a request; see `send` and `receive`."""
        self.send(name, *arguments)
        return self.receive()

    def send(self, name: str, *arguments: Any) -> None:
        """Ask without waiting.

        Args:
            name: of a method of `Worker`.
            arguments: of it; they are pickled.

        Raises:
            WorkerFailed: it is dead.
        """
        try:
            self._connection.send((name, arguments))
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Any:
        """Wait for the answer to what was sent.

        Raises:
            WorkerFailed: it could not, or it is dead.
            TaskError: the task is at fault.
        """
        try:
            # a process that it started may hold its end of the pipe open after its death
            while not self._connection.poll(_CHECK_SECONDS):
                if not self._process.is_alive() and not self._connection.poll(0):
                    raise EOFError
            kind, content = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if kind == "refused":
            raise TaskError(content)
        if kind == "failed":
            raise WorkerFailed(content)
        return content

    def close(self) -> None:
        """Close the pipe: the process ends by itself once it has answered what it was asked."""
        self._connection.close()
        self._theirs.close()

    def end(self, patience: float = _PATIENCE_SECONDS) -> None:
        """Have it end, and kill it if it has not after some seconds."""
        self.close()
        if self.pid is None:
            return
        self._process.join(patience)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _death(self) -> WorkerFailed:
        self._process.join(_PATIENCE_SECONDS)
        return WorkerFailed(failure_of_death(self._process.exitcode, str(self._log)))


class Processes:
    """Those that live at the same time, in a `with` block; none outlives it."""

    def __init__(self) -> None:
        self._alive: list[Process] = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # an interrupt does not wait for steps to end
        patience = _PATIENCE_SECONDS if kind is None else 0.0
        # first all pipes, so that they end even if this is interrupted too
        for process in self._alive:
            process.close()
        for process in self._alive:
            process.end(patience)

    def start(self, log: Path) -> Process:
        """Start one that prints to a file."""
        process = Process(log)
        # in the list before it is started, so that no interrupt can come between
        self._alive.append(process)
        process.start()
        return process


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block Ctrl-C in a process that is started in the block; here it is only delayed until the end of the block.

    Before the new process ignores the signal itself, it would die of it, with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # it is started with the first process, and takes the mask off
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
