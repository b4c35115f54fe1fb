"""A run's folder: `settings.yaml`, `metrics.jsonl`, `checkpoints/step-00000100/`, and `summary.json` at the end.

A folder belongs to one run: another run never writes into it, and the same run goes on in it only when asked to resume,
in one process at a time.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import duotone.torch as dt
from duotone import own_folder
from duotone.config_file import read_config
from duotone.durable_files import append_line, flush, make_folder, read_bounded, replace_text
from duotone.errors import CheckpointError, TaskError
from duotone.run_settings import RunSettings, resolve_settings

_SETTINGS, _METRICS, _SUMMARY = "settings.yaml", "metrics.jsonl", "summary.json"
_MOST_METRICS_BYTES, _MOST_SUMMARY_BYTES = 1 << 31, 1 << 24
_CHECKPOINT = re.compile(r"step-\d+")
# settings of where a run is carried out and how often it reports; the others decide its result
_FREE = frozenset(
    {"device", "backend", "compile", "parallel", "log_every", "evaluate_every", "checkpoint_every", "keep"}
)


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
            TaskError: something is there already, or it cannot be read.
        """
        obstacle = own_folder.obstacle(self.path, _SETTINGS, "run")
        if obstacle is not None:
            raise TaskError(obstacle)

    def start(self, settings: RunSettings) -> None:
        """Make the folder for a new run.

        Raises:
            TaskError: something is there already, or it cannot be written to. Nothing is touched then.
        """
        self.check_free()
        try:
            make_folder(self.path)
            replace_text(self.path / _SETTINGS, settings.to_yaml())
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
        if own.policy != settings.policy:
            raise CheckpointError(
                f'{self.path} is a run under policy "{own.policy.name}", not "{settings.policy.name}"; '
                "resume it under its own policy, or start a new run in another --out"
            )
        there, here = own.to_values(), settings.to_values()
        for name in there.keys() - _FREE - {"policy"}:
            if there[name] != here[name]:
                raise TaskError(
                    f"{self.path} is a run with {name} {there[name]}, not {here[name]}; "
                    "resume it without changing that, or start a new run in another --out"
                )

    def checkpoint_path(self, step: int) -> Path:
        """Return where the checkpoint of a step belongs."""
        return self.path / "checkpoints" / f"step-{step:08d}"

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, intact or not, the newest first."""
        paths = dt.checkpoints.list_all(self.path / "checkpoints")
        return sorted((path for path in paths if _CHECKPOINT.fullmatch(path.name)), key=step_of, reverse=True)

    def find_checkpoint(self, which: Literal["latest", "latest-valid"]) -> tuple[Path, list[str]]:
        """Return a checkpoint whose every byte is right, and the newer ones with what is wrong with each.

        Args:
            which: `"latest"` is the newest and no other.

        Raises:
            CheckpointError: there is none, or the newest is damaged and no other was asked for.
        """
        broken: list[str] = []
        for path in self.checkpoints():
            try:
                dt.checkpoints.verify(path)
            except CheckpointError as error:
                broken.append(f"{path.name} ({error.damage or error})")
                continue
            if broken and which == "latest":
                raise CheckpointError(
                    f"{self.path} ends with a checkpoint that cannot be used, {broken[0]}; --resume latest-valid goes "
                    f"on from {path.name}, which is intact"
                )
            return path, broken
        what = f"intact checkpoint: {', '.join(broken)}" if broken else "checkpoint"
        raise CheckpointError(f"{self.path} holds no {what}; start the run anew in another --out")

    def remove_old_checkpoints(self, step: int, keep: int) -> None:
        """Keep the checkpoint of a step and those before it, `keep` in all.

        Later ones go too: the run went back behind them to this step, because they were damaged.
        """
        paths = self.checkpoints()
        kept = [path for path in paths if step_of(path) <= step][:keep]
        for path in paths:
            if path not in kept:
                dt.checkpoints.remove(path)

    def remove_leftovers(self) -> None:
        """Remove what processes that died left of checkpoints that they were writing or removing."""
        dt.checkpoints.remove_leftovers(self.path / "checkpoints")

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line to the metrics.

        Raises:
            TaskError: it could not be written; no part of it stays.
        """
        with self._writing(_METRICS) as path:
            append_line(path, json.dumps(line))

    def flush_metrics(self) -> None:
        """Wait until the metrics are on the disk, so that no checkpoint is ahead of them."""
        with self._writing(_METRICS) as path:
            if path.exists():
                flush(path)

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after a step: what an interrupted run logged beyond its last checkpoint.

        Raises:
            TaskError: it could not be written; the old lines stay.
        """
        with self._writing(_METRICS) as path:
            if not path.exists():
                return
            kept = []
            for number, line in enumerate(self._read(path, _MOST_METRICS_BYTES).splitlines(), 1):
                try:
                    is_kept = json.loads(line)["step"] <= step
                except ValueError:
                    # a line that was cut short by a crash can only be the last one
                    break
                except (TypeError, LookupError, RecursionError) as error:
                    raise TaskError(
                        f"cannot read {path}: line {number} is none of metrics; move it away, and --resume goes on"
                    ) from error
                if is_kept:
                    kept.append(line + "\n")
            replace_text(path, "".join(kept))

    def summary(self) -> dict[str, Any] | None:
        """Return the run's result, or None if it has none yet.

        Raises:
            TaskError: it cannot be read.
        """
        path = self.path / _SUMMARY
        if not path.exists():
            return None
        try:
            summary = json.loads(self._read(path, _MOST_SUMMARY_BYTES))
        except (ValueError, RecursionError) as error:
            raise TaskError(f"cannot read {path}: {error}; remove it, and --resume writes it anew") from error
        if not isinstance(summary, dict):
            raise TaskError(f"cannot read {path}: it is no summary; remove it, and --resume writes it anew")
        return summary

    def _read(self, path: Path, most_bytes: int) -> str:
        try:
            return read_bounded(path, most_bytes)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TaskError(f"cannot read {path}: {reason}; move it away, and --resume goes on") from error

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the run's result.

        Raises:
            TaskError: it could not be written.
        """
        with self._writing(_SUMMARY) as path:
            replace_text(path, json.dumps(summary, indent=1) + "\n")

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        path = self.path / name
        try:
            yield path
        except OSError as error:
            raise TaskError(f"cannot write {path}: {error.strerror}; {self.what_remains()}") from error

    def what_remains(self) -> str:
        """Return what a run that cannot write has on the disk, and what to do, in a few words."""
        paths = self.checkpoints()
        last = f"{paths[0].name} is untouched" if paths else "the run has no checkpoint yet"
        return f"{last}; when that is mended, go on with --resume"


def step_of(checkpoint: Path) -> int:
    """Return the step of a run's checkpoint.

    >>> step_of(Path("runs/digits-bf16-1/checkpoints/step-00000120"))
    120
    """
    return int(checkpoint.name.removeprefix("step-"))


@contextmanager
def held_folder(path: Path | None, root: Path, settings: RunSettings) -> Iterator[RunFolder]:
    """Hold a run's folder for the length of a block, in which no other process can; it is made if it is not there.

    Args:
        path: where it is; None for the next free one, which is `next_free_folder`'s.
        root: as of `next_free_folder`.
        settings: as of `next_free_folder`.

    Raises:
        FolderError: another process holds it, or it cannot be written to.
    """
    made = own_folder.made_next(root, _stem(settings)) if path is None else nullcontext(path)
    with made as place, own_folder.locked(place) as folder:
        yield RunFolder(folder)


def next_free_folder(root: Path, settings: RunSettings) -> Path:
    """Return `root/<task>-<policy>-<n>` with the lowest n that is free.

    >>> next_free_folder(Path("runs"), RunSettings(task="digits:convnet", policy="fp16,loss_scale=8")).name
    'digits-convnet-fp16-loss_scale-8-1'
    """
    return own_folder.next_free_folder(root, _stem(settings))


def _stem(settings: RunSettings) -> str:
    task = Path(settings.task).stem if settings.task.endswith(".py") else settings.task
    text = f"{task}-{settings.policy.name}"
    return "-".join("".join(char if char.isalnum() or char == "_" else " " for char in text).split())
