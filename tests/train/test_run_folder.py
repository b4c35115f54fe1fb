"""A run's folder belongs to one run."""

import pytest

from duotone.errors import CheckpointError, TaskError
from duotone.train import RunFolder, RunSettings, next_free_folder

SETTINGS = RunSettings(task="digits", policy="bf16", steps=10)


@pytest.fixture
def folder(tmp_path):
    started = RunFolder(tmp_path / "run")
    started.start(SETTINGS)
    return started


def test_another_run_is_not_overwritten(folder):
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(TaskError, match="holds another run; choose another --out"):
        RunFolder(folder.path).start(SETTINGS)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_other_files_are_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(TaskError, match="holds other files"):
        RunFolder(tmp_path).start(SETTINGS)
    with pytest.raises(TaskError, match="holds other files"):
        RunFolder(tmp_path / "thesis.tex").start(SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_free(tmp_path):
    RunFolder(tmp_path).start(SETTINGS)
    assert (tmp_path / "settings.yaml").exists()


def test_the_same_run_may_be_watched_differently(folder):
    folder.check_same_run(RunSettings(task="digits", policy="bf16", steps=10, log_every=1, checkpoint_every=7))


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
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        RunFolder(tmp_path).latest_checkpoint()


def test_the_next_free_folder(tmp_path):
    first = next_free_folder(tmp_path, RunSettings(task="some/where/own_task.py", policy="bf16-mixed"))
    assert first == tmp_path / "own_task-bf16-mixed-1"
    first.mkdir()
    second = next_free_folder(tmp_path, RunSettings(task="some/where/own_task.py", policy="bf16-mixed"))
    assert second == tmp_path / "own_task-bf16-mixed-2"
