"""A comparison's folder: what was asked for, what was measured, and the report.

plan.json          what is compared
subject.json       what is trained, as its task says it
environment.json   device, versions, date
pace.json          steps and turns, after the trials
trials/ARM.json    records, each written whole when it is obtained
runs/ARM-seedN.json
fits/ARM.json
logs/ARM-*.log     what an arm's processes printed
profiles/ARM.json  one step of an arm, for chrome://tracing and Perfetto
report.html, report.md, report.json
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from duotone import durable_files
from duotone.compare.plan import Pace, Plan
from duotone.compare.records import Fit, Run, Trial, fit_from_json, run_from_json, to_json, trial_from_json
from duotone.compare.subject import Subject
from duotone.errors import CompareError, TaskError

Value = TypeVar("Value")

_PLAN, _PACE, _SUBJECT, _ENVIRONMENT = "plan.json", "pace.json", "subject.json", "environment.json"


class ComparisonFolder:
    """The folder of one comparison.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check_free(self) -> None:
        """Raise unless a new comparison can start here.

        Raises:
            CompareError: something is there already.
        """
        if self.path.is_file():
            raise CompareError(f"{self.path} is a file; choose another --out")
        if self.path.is_dir() and any(self.path.iterdir()):
            what = "another comparison" if (self.path / _PLAN).exists() else "other files"
            raise CompareError(f"{self.path} holds {what}; choose another --out, or go on with it by --resume")

    def start(self, plan: Plan) -> None:
        """Make the folder for a new comparison.

        Raises:
            CompareError: something is there already, or it cannot be written to.
        """
        self.check_free()
        self._write(_PLAN, plan.to_json())

    def write_plan(self, plan: Plan) -> None:
        """Keep what is asked for from now on."""
        self._write(_PLAN, plan.to_json())

    def plan(self) -> Plan:
        """Return what was asked for.

        Raises:
            CompareError: there is no comparison, or its plan cannot be read.
        """
        if not (self.path / _PLAN).is_file():
            raise CompareError(f"{self.path} holds no comparison; start one by duotone compare --out {self.path}")
        return self._read(_PLAN, Plan.from_json)

    def write_pace(self, pace: Pace) -> None:
        """Keep the pace, once it is decided."""
        self._write(_PACE, asdict(pace))

    def pace(self) -> Pace | None:
        """Return the pace, or None before it is decided."""
        return self._read(_PACE, lambda content: Pace(**content)) if (self.path / _PACE).exists() else None

    def write_subject(self, subject: Subject) -> None:
        """Keep what is trained."""
        self._write(_SUBJECT, asdict(subject))

    def subject(self) -> Subject | None:
        """Return what is trained, or None before it is known."""
        return self._read(_SUBJECT, lambda content: Subject(**content)) if (self.path / _SUBJECT).exists() else None

    def write_environment(self, environment: Mapping[str, str]) -> None:
        """Keep what the figures depend on besides the code."""
        self._write(_ENVIRONMENT, dict(environment))

    def environment(self) -> dict[str, str]:
        """Return what `write_environment` kept, or nothing."""
        return self._read(_ENVIRONMENT, dict) if (self.path / _ENVIRONMENT).exists() else {}

    def write(self, record: Trial | Run | Fit) -> None:
        """Keep a record, in place of one of the same arm (and seed).

        Raises:
            CompareError: it could not be written.
        """
        match record:
            case Trial():
                name = f"trials/{_file(record.arm)}.json"
            case Run():
                name = f"runs/{_file(record.arm)}-seed{record.seed}.json"
            case Fit():
                name = f"fits/{_file(record.arm)}.json"
        self._write(name, to_json(record))

    def trials(self) -> dict[str, Trial]:
        """Return the trials by arm."""
        return {trial.arm: trial for trial in self._records("trials", trial_from_json)}

    def runs(self) -> dict[tuple[str, int], Run]:
        """Return the runs that have ended, by arm and seed."""
        return {(run.arm, run.seed): run for run in self._records("runs", run_from_json)}

    def fits(self) -> dict[str, Fit]:
        """Return the searches for the largest batch, by arm."""
        return {fit.arm: fit for fit in self._records("fits", fit_from_json)}

    def log_path(self, arm: str, what: str) -> Path:
        """Return where a process of an arm prints to, with its folder made; `what` tells its processes apart."""
        path = self.path / "logs" / f"{_file(arm)}-{what}.log"
        with self._writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def profile_path(self, arm: str) -> Path:
        """Return where an arm's profile belongs, with its folder made."""
        path = self.path / "profiles" / f"{_file(arm)}.json"
        with self._writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write one of the report's files, whole or not at all, and return where it is."""
        path = self.path / name
        with self._writing(path):
            durable_files.replace_text(path, text)
        return path

    def _records(self, kind: str, read: Callable[[Mapping[str, Any]], Value]) -> Iterator[Value]:
        for path in sorted((self.path / kind).glob("*.json")):
            yield self._read(f"{kind}/{path.name}", read)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        path = self.path / name
        with self._writing(path):
            durable_files.make_folder(path.parent)
            durable_files.replace_text(path, json.dumps(content, indent=1) + "\n")

    def _read(self, name: str, read: Callable[[Mapping[str, Any]], Value]) -> Value:
        path = self.path / name
        try:
            return read(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, CompareError | TaskError):
                raise
            raise CompareError(f"cannot read {path}: {error}; remove it, and --resume measures it anew") from error

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CompareError(
                f"cannot write {path}: {error.strerror}; what was measured before is kept, go on with --resume"
            ) from error


def _file(arm: str) -> str:
    """Return an arm's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", arm)


def next_free_folder(root: Path, task: str) -> Path:
    """Return `root/<task>-<n>` with the lowest n that is free.

    >>> next_free_folder(Path("comparisons"), "examples/own_task.py").as_posix()
    'comparisons/own_task-1'
    """
    stem = Path(task).stem if task.endswith(".py") else _file(task).replace("_", "-")
    number = 1
    while (root / f"{stem}-{number}").exists():
        number += 1
    return root / f"{stem}-{number}"
