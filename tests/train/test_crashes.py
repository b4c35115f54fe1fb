"""A run that dies, or finds the disk full, at any write or rename goes on to the same bits."""

import errno
import io
import os
import warnings
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from duotone.errors import CheckpointError, DuotoneError, DuotoneWarning
from duotone.train import RunFolder, Trainer

from ..dying import Death, fail_at
from .small_task import small_task

SETTINGS = {"steps": 2, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 1, "policy": "fp16", "keep": 1}
CALLS = [(os, "mkdir"), (os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (io, "open")]


def files(folder: Path) -> dict[str, bytes]:
    """Return every file of a run's checkpoints: they hold all that its next step would depend on."""
    found = sorted(path for path in (folder / "checkpoints").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def go_on(make_trainer, path: Path, **settings) -> Trainer:
    """Return a trainer for the run in a folder, from its start if it has no checkpoint, as the command line does."""
    trainer = make_trainer(small_task, None, **settings)
    trainer.folder = RunFolder(path)
    if trainer.folder.checkpoints():
        trainer.resume()
    else:
        trainer.folder.cut_metrics(0)
    return trainer


@pytest.mark.parametrize("error", [Death, lambda: OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_survives_a_failure_at_every_call(make_trainer, tmp_path, monkeypatch, error):
    list(make_trainer(small_task, tmp_path / "whole", **SETTINGS).run())
    expected = files(tmp_path / "whole")
    resumed_from = set()
    for number in count():
        path = tmp_path / str(number)
        trainer = make_trainer(small_task, path, **SETTINGS)
        with monkeypatch.context() as patch:
            failed = fail_at(patch, number, CALLS, error)
            with suppress(Death, DuotoneError):
                list(trainer.run())
        if not failed:
            break
        left = RunFolder(path).checkpoints()
        if left:
            # whatever stands is intact
            assert RunFolder(path).find_checkpoint("latest") == (left[0], [])
        resumed_from.add(left[0].name if left else None)
        list(go_on(make_trainer, path, **SETTINGS).run())
        assert files(path) == expected
        assert not list((path / "checkpoints").glob(".*"))
    assert resumed_from == {None, "step-00000001", "step-00000002"}


def test_going_back_behind_a_damaged_checkpoint(make_trainer, tmp_path):
    settings = SETTINGS | {"keep": 4, "steps": 7, "checkpoint_every": 2}
    list(make_trainer(small_task, tmp_path / "whole", **settings).run())
    list(make_trainer(small_task, tmp_path / "run", **settings).run(stop_after=7))
    for step in (6, 7):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="--resume latest-valid goes on from step-00000004, which is intact"):
        make_trainer(small_task, tmp_path / "run", resume=True, **settings)
    trainer = make_trainer(small_task, None, **settings)
    trainer.folder = RunFolder(tmp_path / "run")
    with pytest.warns(DuotoneWarning) as noted:
        trainer.resume("latest-valid")
    assert [str(each.message) for each in noted] == [
        "passed over step-00000007 (no manifest.json) and step-00000006 (no manifest.json); going on from "
        "step-00000004, 3 steps are done again"
    ]
    assert trainer.resumed_at == 4
    # whoever resumes from now on meets no damaged one
    assert [path.name for path in trainer.folder.checkpoints()] == ["step-00000004", "step-00000002"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(trainer.run())
    assert files(tmp_path / "run") == files(tmp_path / "whole")
