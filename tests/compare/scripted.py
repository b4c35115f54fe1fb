"""Processes that answer what a test has written down, and watchers that write down the events that they receive."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duotone.compare.failures import WorkerFailed
from duotone.compare.measuring.device_state import DeviceState
from duotone.compare.measuring.turn import Step, Turn
from duotone.compare.processes.worker import BatchMeasurement
from duotone.compare.records import Failure, Phases, Trial
from duotone.compare.subject import Subject

SUBJECT = Subject("tiny", "loss", True, "samples", 49, {}, {}, task_steps=40, task_warmup_steps=4, micro_batch=8)


class Script:
    """What processes answer, and what they were asked.

    Attributes:
        asked: pairs of a request and an arm (and its seed, where it trains), in order.
        errors: what is raised instead of an answer, by such a pair.
        step_seconds: by arm; 0.1 for those that are not named.
        step_seconds_of: functions by arm, where they change from trial to trial.
        free_bytes: memory that the machine has.
        started, ended: how many processes have.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.errors: dict[tuple[str, str], BaseException] = {}
        self.step_seconds: dict[str, float] = {}
        self.step_seconds_of: dict[str, Callable[[], float]] = {}
        self.free_bytes = 10**12
        self.started = self.ended = 0

    def fail(self, request: str, arm: str, kind: str) -> None:
        """Have a request fail from now on."""
        self.errors[request, arm] = WorkerFailed(Failure(kind, f"it is {kind}"))

    def asked_for(self, request: str) -> list[str]:
        """Return the arms for which a request was made."""
        return [arm for name, arm in self.asked if name == request]


class ScriptedProcess:
    """Stands in for a `Process`."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._arm = ""
        self._sent: Callable[[], Any] = lambda: None

    def ask(self, name: str, *arguments: Any) -> Any:
        self.send(name, *arguments)
        return self.receive()

    def send(self, name: str, *arguments: Any) -> None:
        if name in ("inspect", "try_arm", "start", "measure"):
            entry = arguments[0]
            self._arm = f"{entry.arm.name} {entry.seed}" if name == "start" else entry.arm.name
        self._script.asked.append((name, self._arm))
        self._sent = lambda: self._answer(name, *arguments)

    def receive(self) -> Any:
        return self._sent()

    def end(self, patience: float = 0.0) -> None:
        self._script.ended += 1

    def _answer(self, name: str, *arguments: Any) -> Any:
        if (name, self._arm) in self._script.errors:
            raise self._script.errors[name, self._arm]
        seconds = self._script.step_seconds.get(self._arm, 0.1)
        if name == "try_arm" and self._arm in self._script.step_seconds_of:
            seconds = self._script.step_seconds_of[self._arm]()
        answers: dict[str, Callable[..., Any]] = {
            "inspect": lambda entry: (SUBJECT, DeviceState("cpu", None, self._script.free_bytes)),
            "try_arm": lambda *_: Trial(self._arm, phases=Phases(seconds, 0, 0, 0), peak_memory_bytes=10**6),
            "start": lambda entry: None,
            "take": lambda steps: Turn(tuple(Step(Phases(0.1, 0, 0.1, 0), 8.0, 1.5) for _ in range(steps)), 0.5),
            "evaluate": lambda: {"loss": 0.25},
            "notes": lambda: ("a note",),
            "measure": lambda entry, size: BatchMeasurement(1000 * size + 500, 100.0 * size),
        }
        return answers[name](*arguments)


class ScriptedProcesses:
    """Stands in for `Processes`."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def __enter__(self) -> "ScriptedProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def start(self, log: Path) -> ScriptedProcess:
        self._script.started += 1
        return ScriptedProcess(self._script)


class Witness:
    """A watcher that writes down the events: a name and its arguments."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments: self.events.append((name, *arguments))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of all calls of a name."""
        return [tuple(arguments) for event, *arguments in self.events if event == name]


def scripted(patch: pytest.MonkeyPatch) -> Script:
    """Have comparisons ask scripted processes, and return the script."""
    script = Script()
    for module in ("comparison", "processes.turns", "fit.fit_arm"):
        patch.setattr(f"duotone.compare.{module}.Processes", lambda: ScriptedProcesses(script))
    return script
