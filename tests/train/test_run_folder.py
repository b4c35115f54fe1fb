"""A run's folder belongs to one run."""

import errno
import io
import json
import os
from pathlib import Path

import pytest
from torch import nn

import duotone.torch as dt
from duotone.errors import CheckpointError, TaskError
from duotone.train import RunFolder, RunSettings, next_free_folder

SETTINGS = RunSettings(task="digits", policy="bf16", steps=10)


@pytest.fixture
def folder(tmp_path):
    started = RunFolder(tmp_path / "run")
    started.start(SETTINGS)
    return started


def write(folder: RunFolder, *steps: int) -> list[Path]:
    model = nn.Linear(1, 1)
    return [dt.save_checkpoint(folder.checkpoint_path(step), model, progress={"step": step}) for step in steps]


def damage(checkpoint: Path) -> None:
    (checkpoint / "tensors.safetensors").write_bytes(b"")


def test_another_run_is_not_overwritten(folder):
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(TaskError, match="holds another run; choose another --out"):
        RunFolder(folder.path).start(SETTINGS)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_other_files_are_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(TaskError, match="holds other files"):
        RunFolder(tmp_path).start(SETTINGS)
    with pytest.raises(TaskError, match=r"thesis\.tex is a file; choose another --out$"):
        RunFolder(tmp_path / "thesis.tex").start(SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_free(tmp_path):
    RunFolder(tmp_path).start(SETTINGS)
    assert (tmp_path / "settings.yaml").exists()


def test_the_same_run_may_be_watched_differently(folder):
    folder.check_same_run(RunSettings(task="digits", policy="bf16", steps=10, log_every=1, checkpoint_every=7, keep=9))


def test_another_spelling_of_the_policy_is_the_same_policy(folder):
    folder.check_same_run(RunSettings(task="digits", policy="bfloat16", steps=10))


def test_another_policy_is_refused(folder):
    with pytest.raises(CheckpointError, match='is a run under policy "bf16", not "fp16"'):
        folder.check_same_run(RunSettings(task="digits", policy="fp16", steps=10))


def test_another_setting_is_refused(folder):
    with pytest.raises(TaskError, match="is a run with steps 10, not 20"):
        folder.check_same_run(RunSettings(task="digits", policy="bf16", steps=20))


def test_no_run_to_resume(tmp_path):
    with pytest.raises(TaskError, match="holds no run to resume"):
        RunFolder(tmp_path).settings()
    assert RunFolder(tmp_path).checkpoints() == []
    for which in ("latest", "latest-valid"):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            RunFolder(tmp_path).find_checkpoint(which)


def test_the_next_free_folder(tmp_path):
    first = next_free_folder(tmp_path, RunSettings(task="some/where/own_task.py", policy="bf16-mixed"))
    assert first == tmp_path / "own_task-bf16-mixed-1"
    first.mkdir()
    second = next_free_folder(tmp_path, RunSettings(task="some/where/own_task.py", policy="bf16-mixed"))
    assert second == tmp_path / "own_task-bf16-mixed-2"


def test_a_start_that_died_is_no_run(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        # the dead tidy up nothing
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            folder.start(SETTINGS)
    assert any(folder.path.iterdir())
    with pytest.raises(TaskError, match="holds no run to resume; start one without --resume"):
        folder.settings()
    folder.start(SETTINGS)
    assert [path.name for path in folder.path.iterdir()] == ["settings.yaml"]


def test_where_nothing_may_be_written(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(TaskError, match=r"cannot write to .*run: Read-only file system"):
        RunFolder(tmp_path / "run").start(SETTINGS)


def test_where_nothing_may_be_read(folder, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(TaskError, match=r"cannot read .*run: Permission denied; choose another --out"):
        folder.check_free()


def test_the_newest_checkpoint_is_found(folder):
    (folder.path / "checkpoints" / "notes").mkdir(parents=True)
    paths = write(folder, 9, 10, 123456789)
    assert folder.checkpoints() == paths[::-1]
    assert folder.find_checkpoint("latest") == folder.find_checkpoint("latest-valid") == (paths[-1], [])


def test_a_damaged_one_is_passed_over_when_asked(folder):
    first, second, third = write(folder, 1, 2, 3)
    damage(second)
    (third / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        folder.find_checkpoint("latest")
    assert str(caught.value) == (
        f"{folder.path} ends with a checkpoint that cannot be used, step-00000003 (no manifest.json); --resume "
        "latest-valid goes on from step-00000001, which is intact"
    )
    broken = ["step-00000003 (no manifest.json)", "step-00000002 (tensors.safetensors is damaged)"]
    assert folder.find_checkpoint("latest-valid") == (first, broken)
    (first / "tensors.safetensors").unlink()
    for which in ("latest", "latest-valid"):
        with pytest.raises(CheckpointError) as caught:
            folder.find_checkpoint(which)
        assert str(caught.value) == (
            f"{folder.path} holds no intact checkpoint: {', '.join(broken)}, step-00000001 (no tensors.safetensors); "
            "start the run anew in another --out"
        )


def test_the_summary_comes_back(folder):
    assert folder.summary() is None
    folder.write_summary({"step": 3})
    assert folder.summary() == {"step": 3}
    (folder.path / "summary.json").write_text("{")
    with pytest.raises(TaskError, match=r"cannot read .*summary\.json: .*; remove it, and --resume writes it anew"):
        folder.summary()


@pytest.mark.parametrize(("keep", "left"), [(1, [8]), (2, [4, 8]), (3, [2, 4, 8]), (9, [2, 4, 8])])
def test_as_many_checkpoints_stay_as_asked(folder, keep, left):
    paths = dict(zip((2, 4, 8, 16), write(folder, 2, 4, 8, 16), strict=True))
    # the run went back behind step 16, so that the newest of its own is step 8
    folder.remove_old_checkpoints(8, keep)
    assert sorted(folder.checkpoints()) == [paths[step] for step in left]
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == [paths[step].name for step in left]


def test_metrics_are_written_whole_or_not_at_all(folder, monkeypatch):
    for step in range(4):
        folder.append_metrics({"step": step})
    write(folder, 2)
    metrics = folder.path / "metrics.jsonl"
    before = metrics.read_bytes()

    def fail(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = "cannot write .*: No space left on device; step-00000002 is untouched; when that is mended, go on with"
    for module, call in ((os, "replace"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, call, fail)
            with pytest.raises(TaskError, match=message):
                folder.cut_metrics(2)
            with pytest.raises(TaskError, match=message):
                folder.write_summary({})
    with monkeypatch.context() as patch:
        patch.setattr(io, "open", fail)
        with pytest.raises(TaskError, match=message):
            folder.append_metrics({"step": 5})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(TaskError, match=message):
            folder.flush_metrics()
    assert metrics.read_bytes() == before
    assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoints", "metrics.jsonl", "settings.yaml"]
    folder.cut_metrics(2)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [0, 1, 2]
