"""A run's folder: `settings.yaml`, `metrics.jsonl`, `checkpoints/step-00000100/`, and `summary.json` at the end.

A folder belongs to one run: another run never writes into it, and the same run goes on in it only when asked to resume.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from duotone.errors import CheckpointError, TaskError
from duotone.policy import Policy
from duotone.train.settings import RunSettings, read_config, resolve_settings

KEPT_CHECKPOINTS = 2
_SETTINGS, _METRICS, _SUMMARY = "settings.yaml", "metrics.jsonl", "summary.json"
# settings that say how a run is watched or where it runs; the others decide its result
_FREE = frozenset({"device", "backend", "log_every", "evaluate_every", "checkpoint_every"})


class RunFolder:
    """The folder of one run.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check_free(self) -> None:
        """Raise unless a new run can start here.

        Raises:
            TaskError: something is there already.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            what = "another run" if (self.path / _SETTINGS).exists() else "other files"
            raise TaskError(f"{self.path} holds {what}; choose another --out, or go on with a run by --resume")

    def start(self, settings: RunSettings) -> None:
        """Make the folder for a new run.

        Raises:
            TaskError: something is there already, or it cannot be written to. Nothing is touched then.
        """
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / _SETTINGS).write_text(settings.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise TaskError(f"cannot write to {self.path}: {error.strerror}") from error

    def settings(self) -> dict[str, Any]:
        """Return the settings of the run that is there.

        Raises:
            TaskError: there is no run.
        """
        if not (self.path / _SETTINGS).is_file():
            raise TaskError(f"{self.path} holds no run to resume; start one without --resume")
        return read_config(self.path / _SETTINGS)

    def check_same_run(self, settings: RunSettings) -> None:
        """Raise unless `settings` are those of the run that is there, as far as its result depends on them.

        Raises:
            CheckpointError: the policy is another.
            TaskError: another setting is.
        """
        own = resolve_settings(self.settings())
        if Policy.parse(own.policy) != Policy.parse(settings.policy):
            raise CheckpointError(
                f'{self.path} is a run under policy "{own.policy}", not "{settings.policy}"; '
                "resume it under its own policy, or start a new run in another --out"
            )
        there, here = asdict(own), asdict(settings)
        for name in there.keys() - _FREE - {"policy"}:
            if there[name] != here[name]:
                raise TaskError(
                    f"{self.path} is a run with {name} {there[name]}, not {here[name]}; "
                    "resume it without changing that, or start a new run in another --out"
                )

    def checkpoint_path(self, step: int) -> Path:
        """Return where the checkpoint of a step belongs."""
        return self.path / "checkpoints" / f"step-{step:08d}"

    def latest_checkpoint(self) -> Path:
        """Return the newest checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        found = self._checkpoints()
        if not found:
            raise CheckpointError(f"{self.path} holds no checkpoint; remove it and start the run anew")
        return found[-1]

    def remove_old_checkpoints(self) -> None:
        """Keep the newest checkpoints and remove the others."""
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line to the metrics."""
        with (self.path / _METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after a step: what an interrupted run logged beyond its last checkpoint."""
        path = self.path / _METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                # a line that was cut short by a crash can only be the last one
                break
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the run's result."""
        (self.path / _SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*"))


def next_free_folder(root: Path, settings: RunSettings) -> Path:
    """Return `root/<task>-<policy>-<n>` with the lowest n that is free.

    >>> next_free_folder(Path("runs"), RunSettings(task="digits:convnet", policy="fp16,loss_scale=8")).name
    'digits-convnet-fp16-loss_scale-8-1'
    """
    task = Path(settings.task).stem if settings.task.endswith(".py") else settings.task
    text = f"{task}-{Policy.parse(settings.policy).name}"
    stem = "-".join("".join(char if char.isalnum() or char == "_" else " " for char in text).split())
    number = 1
    while (root / f"{stem}-{number}").exists():
        number += 1
    return root / f"{stem}-{number}"
