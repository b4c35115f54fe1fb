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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from duotone import durable_files, own_folder
from duotone.compare.plan import Pace, Plan
from duotone.compare.records import Fit, Run, Trial
from duotone.compare.subject import Subject
from duotone.errors import CompareError

Record = TypeVar("Record")

# a run of a million steps has fewer
_MOST_BYTES = 1 << 26

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
        obstacle = own_folder.obstacle(self.path, _PLAN, "comparison")
        if obstacle is not None:
            raise CompareError(obstacle)

    def start(self, plan: Plan) -> None:
        """Make the folder for a new comparison.

        Raises:
            CompareError: something is there already, or it cannot be written to.
        """
        self.check_free()
        self.write(plan)

    def plan(self) -> Plan:
        """Return what was asked for.

        Raises:
            CompareError: there is no comparison, or its plan cannot be read.
        """
        plan = self._read_if_there(_PLAN, Plan)
        if plan is None:
            raise CompareError(f"{self.path} holds no comparison; start one by duotone compare --out {self.path}")
        return plan

    def subject(self) -> Subject | None:
        """Return what is trained, or None before it is known."""
        return self._read_if_there(_SUBJECT, Subject)

    def environment(self) -> dict[str, str]:
        """Return what the figures depend on besides the code, or nothing before it is known."""
        return self._read_if_there(_ENVIRONMENT, dict[str, str]) or {}

    def write_environment(self, environment: Mapping[str, str]) -> None:
        """Keep what `environment` returns."""
        self._write(_ENVIRONMENT, environment)

    def pace(self) -> Pace | None:
        """Return the pace, or None before it is decided."""
        return self._read_if_there(_PACE, Pace)

    def write(self, record: Plan | Subject | Pace | Trial | Run | Fit) -> None:
        """Keep a record, in place of one of the same kind (and arm, and seed).

        Raises:
            CompareError: it could not be written.
        """
        match record:
            case Plan():
                name = _PLAN
            case Subject():
                name = _SUBJECT
            case Pace():
                name = _PACE
            case Trial():
                name = f"trials/{_file(record.arm)}.json"
            case Run():
                name = f"runs/{_file(record.arm)}-seed{record.seed}.json"
            case Fit():
                name = f"fits/{_file(record.arm)}.json"
        self._write(name, record)

    def trials(self) -> dict[str, Trial]:
        """Return the trials by arm."""
        return {trial.arm: trial for trial in self._records("trials", Trial)}

    def runs(self) -> dict[tuple[str, int], Run]:
        """Return the runs that have ended, by arm and seed."""
        return {(run.arm, run.seed): run for run in self._records("runs", Run)}

    def fits(self) -> dict[str, Fit]:
        """Return the searches for the largest batch, by arm."""
        return {fit.arm: fit for fit in self._records("fits", Fit)}

    def log_path(self, arm: str, what: str) -> Path:
        """Return where a process of an arm prints to, with its folder made; `what` tells its processes apart."""
        return self._with_folder(self.path / "logs" / f"{_file(arm)}-{what}.log")

    def profile_path(self, arm: str) -> Path:
        """Return where an arm's profile belongs, with its folder made."""
        return self._with_folder(self.path / "profiles" / f"{_file(arm)}.json")

    def _with_folder(self, path: Path) -> Path:
        with self._writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write one of the report's files, whole or not at all, and return where it is."""
        path = self.path / name
        with self._writing(path):
            durable_files.replace_text(path, text)
        return path

    def _records(self, kind: str, record_type: type[Record]) -> Iterator[Record]:
        for path in sorted((self.path / kind).glob("*.json")):
            yield self._read(path, record_type)

    def _read_if_there(self, name: str, record_type: type[Record]) -> Record | None:
        path = self.path / name
        return self._read(path, record_type) if path.exists() else None

    def _read(self, path: Path, record_type: type[Record]) -> Record:
        try:
            # json takes the NaN and Infinity of figures that are not finite, msgspec's own reader does not
            return msgspec.convert(
                json.loads(durable_files.read_bounded(path, _MOST_BYTES), parse_int=_int64), record_type
            )
        # before msgspec 0.20 its errors are no ValueError
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            what = (
                "start a new comparison in another --out"
                if path.name == _PLAN
                else "remove it, and --resume measures it anew"
            )
            raise CompareError(f"cannot read {path}: {error}; {what}") from error

    def _write(self, name: str, content: Any) -> None:
        path = self.path / name
        # read-only mappings are written as dictionaries
        plain = msgspec.to_builtins(content, enc_hook=dict)
        with self._writing(path):
            durable_files.make_folder(path.parent)
            durable_files.replace_text(path, json.dumps(plain, indent=1) + "\n")

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CompareError(
                f"cannot write {path}: {error.strerror}; what was measured before is kept, go on with --resume"
            ) from error


def _int64(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError(f"{text:.20}... is no number of bytes, steps or samples")
    return value


def _file(arm: str) -> str:
    """Return an arm's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", arm)


@contextmanager
def made_folder(root: Path, task: str) -> Iterator[Path]:
    """Make the folder that `next_free_folder` returns, which no other process then gets; removed if it stays empty.

    Raises:
        FolderError: it cannot be made.
    """
    with own_folder.made_next(root, _stem(task)) as path:
        yield path


def next_free_folder(root: Path, task: str) -> Path:
    """Return `root/<task>-<n>` with the lowest n that is free.

    >>> next_free_folder(Path("comparisons"), "examples/own_task.py").as_posix()
    'comparisons/own_task-1'
    """
    return own_folder.next_free_folder(root, _stem(task))


def _stem(task: str) -> str:
    return Path(task).stem if task.endswith(".py") else _file(task).replace("_", "-")
