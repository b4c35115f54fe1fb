"""Files stay whole whatever happens while they are written."""

import errno
import io
import os

import pytest

from duotone.durable_files import append_line, make_folder, replace_text

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("module", "call"), [(io, "open"), (os, "fsync"), (os, "replace")])
def test_a_full_disk_leaves_the_old_text(tmp_path, monkeypatch, module, call):
    path = tmp_path / "a.txt"
    replace_text(path, "old")

    def fail(*_args: object, **_options: object) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(module, call, fail)
        with pytest.raises(OSError, match="No space left"):
            replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    replace_text(path, "new")
    assert path.read_text() == "new"


def test_a_death_before_the_rename_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    replace_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            replace_text(path, "new")
    assert path.read_text() == "old"
    replace_text(path, "newer")
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    append_line(path, "first")
    opened = io.open

    class Full:
        """A file on a disk with three bytes left."""

        def __init__(self, file: io.FileIO) -> None:
            self._file, self._left = file, 3

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def write(self, data: bytes) -> int:
            if not self._left:
                raise FULL
            written = self._file.write(data[: self._left])
            self._left -= written
            return written

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", lambda *arguments: Full(opened(*arguments)))
        with pytest.raises(OSError, match="No space left"):
            append_line(path, "second")
    assert path.read_text() == "first\n"
    append_line(path, "third")
    assert path.read_text() == "first\nthird\n"


def test_each_new_folder_is_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("duotone.durable_files.flush", lambda *paths: flushed.extend(paths))
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert set(flushed) == {tmp_path, tmp_path / "a"}
    make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2
