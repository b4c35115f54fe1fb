"""A writer that dies at any moment leaves a checkpoint to be found, and one that fails leaves nothing of itself."""

import errno
import io
import os
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch

from duotone.errors import CheckpointError
from duotone.torch.checkpoints import atomic_folder, list_all, remove, remove_leftovers, verify
from duotone.torch.checkpoints import folder as checkpoint_folder
from duotone.torch.checkpoints.atomic_folder import partial_folder
from duotone.torch.checkpoints.folder import read_folder, write_folder

from ...dying import Death, fail_at

CHANGES = [(os, "mkdir"), (os, "rename"), (os, "fsync"), (io, "open"), (checkpoint_folder, "save_file")]
REMOVALS = [(os, "unlink"), (os, "rmdir")]
NAMES = ["folder", "other"]


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def contents(step: int) -> dict:
    return {"step": step, "weight": torch.full((3,), float(step))}


@pytest.mark.parametrize("replaces", [True, False])
def test_a_death_at_any_moment_leaves_a_checkpoint(tmp_path, monkeypatch, replaces):
    seen, left = set(), set()
    for number in count():
        parent = tmp_path / str(number)
        path = parent / "folder"
        write_folder(path if replaces else parent / "other", contents(1))
        with monkeypatch.context() as patch:
            died = fail_at(patch, number, CHANGES + REMOVALS, Death)
            with suppress(Death):
                write_folder(path, contents(2))
        if not died:
            break
        if replaces or path.exists():
            verify(path)
            seen.add(read_folder(path)["step"])
            assert path in list_all(parent)
        left |= {name.split(".")[-1].split("-")[0] for name in names_in(parent) if name.startswith(".")}
        # what the dead left is cleared by whoever writes next, except the only thing that stands for "folder"
        write_folder(parent / "other", contents(4))
        if replaces:
            assert read_folder(path)["step"] in (1, 2)
        write_folder(path, contents(3))
        assert read_folder(path)["step"] == 3
        assert names_in(parent) == NAMES
    assert seen == ({1, 2} if replaces else {2})
    assert left == ({"partial", "replaced"} if replaces else {"partial"})


def test_a_death_while_removing_leaves_all_or_nothing(tmp_path, monkeypatch):
    outcomes = set()
    for number in count():
        parent = tmp_path / str(number)
        for name in NAMES:
            write_folder(parent / name, contents(1))
        with monkeypatch.context() as patch:
            died = fail_at(patch, number, CHANGES + REMOVALS, Death)
            with suppress(Death):
                remove(parent / "folder")
        if not died:
            break
        for path in list_all(parent):
            verify(path)
        outcomes.add(len(list_all(parent)))
        write_folder(parent / "other", contents(2))
        assert set(names_in(parent)) <= set(NAMES)
    assert outcomes == {1, 2}


def test_what_stepped_aside_can_be_removed(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    write_folder(path, contents(1))
    # the second rename, of the new one into place
    with monkeypatch.context() as patch:
        assert fail_at(patch, 1, [(os, "rename")], Death) == []
        with pytest.raises(Death):
            write_folder(path, contents(2))
    assert not path.exists()
    assert read_folder(path)["step"] == 1
    remove(path)
    assert list_all(tmp_path) == []
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_folder(path)


def test_a_full_disk_at_any_moment_leaves_what_was_there(tmp_path, monkeypatch):
    outcomes = {}
    for number in count():
        parent = tmp_path / str(number)
        path = parent / "folder"
        write_folder(path, contents(1))
        message = ""
        with monkeypatch.context() as patch:
            failed = fail_at(patch, number, CHANGES, lambda: OSError(errno.ENOSPC, "No space left on device"))
            try:
                write_folder(path, contents(2))
            except CheckpointError as error:
                message = str(error)
        if not failed:
            break
        assert message in ("", f"cannot write the checkpoint {path}: No space left on device")
        verify(path)
        outcomes.setdefault((read_folder(path)["step"], bool(message)), []).append(*failed)
        assert [name for name in names_in(parent) if "replaced" not in name] == ["folder"]
    assert outcomes == {
        # making a folder that is there already, which nothing needs
        (2, False): ["mkdir"],
        (1, True): ["mkdir", "save_file", "open", "open", "fsync", "fsync", "fsync", "rename", "rename"],
        # flushing the renames, after the new one stands
        (2, True): ["fsync"],
    }


def test_a_living_writer_is_left_alone(tmp_path):
    with partial_folder(tmp_path / "folder") as partial:
        for name in NAMES:
            write_folder(tmp_path / name, contents(1))
            assert partial.is_dir()
    # it is done, and did not move its folder into place
    write_folder(tmp_path / "other", contents(2))
    assert names_in(tmp_path) == NAMES


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked", "while it is locked"])
def test_a_new_folder_that_another_writer_takes_for_a_leftover_is_made_again(tmp_path, monkeypatch, moment):
    lock, opened, rmtree = atomic_folder.lock, os.open, shutil.rmtree
    others = []

    def clean_once() -> None:
        if not others:
            others.append("clean")
            remove_leftovers(tmp_path)

    def late_open(path, *arguments, **options):
        clean_once()
        return opened(path, *arguments, **options)

    def late_lock(descriptor):
        clean_once()
        return lock(descriptor)

    def lock_beside(descriptor):
        # what the remover has opened stays locked until it has removed
        if others:
            return lock(descriptor)
        others.append("clean")
        with monkeypatch.context() as patch:
            found = []
            patch.setattr(shutil, "rmtree", lambda path, **_: found.append((lock(descriptor), rmtree(path))))
            remove_leftovers(tmp_path)
        return found[0][0]

    if moment == "before it is opened":
        monkeypatch.setattr(os, "open", late_open)
    else:
        monkeypatch.setattr(atomic_folder, "lock", late_lock if moment == "before it is locked" else lock_beside)
    write_folder(tmp_path / "folder", contents(1))
    assert others
    assert read_folder(tmp_path / "folder")["step"] == 1
    assert names_in(tmp_path) == ["folder"]


def test_files_of_others_are_left_alone(tmp_path):
    others = [".cache", ".x.partial-12", ".x.replaced-", "notes.partial-" + "0" * 32]
    for name in others:
        (tmp_path / name).mkdir()
    write_folder(tmp_path / "folder", contents(1))
    assert names_in(tmp_path) == sorted([*others, "folder"])


def test_new_parents_are_made_and_flushed(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no way to see which file a descriptor is of")
    monkeypatch.setattr(os, "fsync", note)
    write_folder(tmp_path / "a" / "b" / "folder", contents(1))
    parents = [str(path) for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b")]
    assert set(parents) <= set(flushed)
    # the entry of the renamed folder is the last thing to be made safe
    assert flushed[-1] == parents[-1]


@pytest.mark.parametrize(
    "failure", [OSError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only file system")]
)
def test_where_nothing_may_be_written(tmp_path, monkeypatch, failure):
    def refuse(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=f"cannot write the checkpoint .*folder: {failure.strerror}"):
        write_folder(tmp_path / "folder", contents(1))
    assert names_in(tmp_path) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        write_folder(tmp_path / "file" / "folder", contents(1))
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*file: Not a directory"):
        write_folder(tmp_path / "file", contents(1))
    with pytest.raises(CheckpointError, match=r"cannot remove the checkpoint .*file: Not a directory"):
        remove(tmp_path / "file")
    assert names_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("own", ["thesis.tex", "manifest.json", "step-1"])
def test_a_folder_of_something_else_is_neither_replaced_nor_removed(tmp_path, own):
    path = tmp_path / "runs"
    # one of them is named as a file of a checkpoint is, and one is a checkpoint in the folder
    write_folder(path / own, contents(1))
    (path / "more").write_text("x")
    for change in (lambda: write_folder(path, contents(2)), lambda: remove(path)):
        with pytest.raises(CheckpointError, match='runs is no checkpoint, for it holds "'):
            change()
    assert names_in(tmp_path) == ["runs"]
    assert names_in(path) == sorted([own, "more"])


@pytest.mark.parametrize("damage", ["manifest.json", "tensors.safetensors", "both", "more"])
def test_an_empty_folder_and_a_damaged_checkpoint_are_replaced(tmp_path, damage):
    path = tmp_path / "folder"
    write_folder(path, contents(1))
    if damage == "more":
        (path / "notes.txt").write_text("x")
    for name in ("manifest.json", "tensors.safetensors"):
        if damage in (name, "both"):
            (path / name).unlink()
    write_folder(path, contents(2))
    assert read_folder(path)["step"] == 2
    assert names_in(path) == ["manifest.json", "tensors.safetensors"]


def test_a_link_is_followed(tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "last"
    disk.mkdir()
    link.symlink_to(disk / "real")
    for step in (1, 2):
        write_folder(link, contents(step))
        assert link.is_symlink()
        assert read_folder(link)["step"] == read_folder(disk / "real")["step"] == step
    # its writer died between two renames
    (disk / "real").rename(disk / (".real.replaced-" + "0" * 32))
    assert read_folder(link)["step"] == 2
    with pytest.raises(CheckpointError, match="last: it is a link; remove what it points to"):
        remove(link)
    assert names_in(tmp_path) == ["disk", "last"]


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_checkpoint_has_a_name(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"has none; give a path such as|is no checkpoint, for it holds"):
        write_folder(Path(path), contents(1))


def test_a_name_that_is_too_long_or_has_a_line_break(tmp_path):
    for action in (read_folder, verify):
        with pytest.raises(CheckpointError, match=r"no checkpoint at .*: File name too long"):
            action(tmp_path / ("n" * 300))
    leftover = tmp_path / (".a\nb.partial-" + "0" * 32)
    leftover.mkdir()
    write_folder(tmp_path / "folder", contents(1))
    assert names_in(tmp_path) == ["folder"]


def test_an_interrupted_body_is_no_error_of_the_folder(tmp_path):
    with pytest.raises(ValueError, match="mine"), partial_folder(tmp_path / "folder"):
        raise ValueError("mine")
    assert names_in(tmp_path) == []
