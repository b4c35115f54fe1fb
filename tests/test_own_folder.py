"""A folder belongs to one run, and to one process at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from duotone.errors import FolderError
from duotone.own_folder import LOCK, locked, made_next, next_free_folder, obstacle

HOLDER = """
import sys, time
from pathlib import Path
from duotone.own_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_told_of_the_first(tmp_path):
    run = tmp_path / "run"
    with locked(run):
        with pytest.raises(FolderError, match=rf"run is in use by process {os.getpid()} on .*, since 20.*; wait until"):
            locked(run).__enter__()
        (run / "settings.yaml").touch()
    # the lock is gone, what was written stays
    assert [path.name for path in run.iterdir()] == ["settings.yaml"]
    with locked(run):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(FolderError, match=f"in use by process {process.pid} on"):
        locked(run).__enter__()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (run / LOCK).exists()
    assert obstacle(run, "settings.yaml", "run") is None
    with locked(run):
        pass
    assert list(run.iterdir()) == []


def test_a_process_that_the_holder_forks_holds_nothing(tmp_path):
    with locked(tmp_path / "run"):
        pid = os.fork()
        if not pid:
            signal.pause()
            os._exit(0)
    try:
        with locked(tmp_path / "run"):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_what_was_made_and_stays_empty_goes_again(tmp_path):
    with locked(tmp_path / "a" / "b"), made_next(tmp_path / "runs", "one") as made:
        assert made == tmp_path / "runs" / "one-1"
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    # what was there before does not
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_two_starts_at_once_get_two_names(tmp_path, monkeypatch):
    names = iter(["one-1", "one-1", "one-2"])
    monkeypatch.setattr("duotone.own_folder.next_free_folder", lambda root, _: root / next(names))
    with made_next(tmp_path, "one") as first, made_next(tmp_path, "one") as second:
        assert (first.name, second.name) == ("one-1", "one-2")


def test_a_long_name_is_cut(tmp_path):
    assert next_free_folder(tmp_path, "x" * 1000).name == "x" * 120 + "-1"


@pytest.mark.parametrize("name", ["x" * 300, "no\0name", "file/below"])
def test_where_no_folder_can_be(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="cannot write to"):
        locked(tmp_path / name).__enter__()
    with pytest.raises(FolderError, match="choose another --out"):
        locked(tmp_path / "file").__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "run"), locked(tmp_path / "run"):
        pass
    assert not Path(tmp_path / "run").exists()
