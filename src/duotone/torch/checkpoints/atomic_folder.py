"""The folder of a checkpoint, replaced or removed as a whole, and what a writer that died left beside it.

A folder is written as `.NAME.partial-TOKEN` and renamed to `NAME`. If `NAME` exists, it is first set aside as
`.NAME.replaced-TOKEN`; a process that dies between those two renames leaves no `NAME`, and `resolve` finds the one
that was set aside. A lock on the partial folder, which ends with its process, tells a living writer from a dead one.
A link is followed, and nothing but a checkpoint, or an empty folder, is ever replaced or removed.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

from duotone.durable_files import flush, lock, make_folder
from duotone.errors import CheckpointError

MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-[0-9a-f]{32}", re.DOTALL)
_FILE = re.compile(r"manifest\.json|tensors(-\d+-of-\d+)?\.safetensors")


def list_all(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints in a folder, sorted by name, intact or not; none if there is no such folder.

    Raises:
        CheckpointError: the folder cannot be read.

    >>> list_all("no/such/folder")
    []
    """
    folder = Path(folder)
    try:
        entries = list(folder.iterdir()) if folder.exists() else []
        paths = {entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoints in {folder}: {error.strerror}") from error
    for entry in entries:
        leftover = _LEFTOVER.fullmatch(entry.name)
        if leftover is not None and leftover["kind"] == "replaced":
            paths.add(folder / leftover["name"])
    return sorted(paths)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint; another process sees either all of it or none.

    Raises:
        CheckpointError: it does not exist, is a link or no checkpoint, or cannot be removed.

    >>> remove("no/such/folder")
    Traceback (most recent call last):
    duotone.errors.CheckpointError: cannot remove the checkpoint no/such/folder: No such file or directory
    """
    path = Path(path)
    if path.is_symlink():
        raise CheckpointError(f"cannot remove the checkpoint {path}: it is a link; remove what it points to")
    current = resolve(path)
    try:
        _check_is_checkpoint(current)
        doomed = _new_sibling(path, "partial")
        for old in _replaced(path):
            if old != current:
                shutil.rmtree(old)
        current.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(f"cannot remove the checkpoint {path}: {error.strerror}") from error


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what writers that died left beside the checkpoints in a folder; every save does this first.

    What a living process writes stays. A folder that was set aside stays if no new one took its name. This raises
    nothing: what cannot be removed stays, too.

    >>> remove_leftovers("no/such/folder")
    """
    folder = Path(folder)
    for entry in folder.glob(".*-*"):
        leftover = _LEFTOVER.fullmatch(entry.name)
        if leftover is None:
            continue
        if leftover["kind"] == "partial":
            _remove_unless_locked(entry)
        elif (folder / leftover["name"]).exists():
            shutil.rmtree(entry, ignore_errors=True)


def resolve(path: Path) -> Path:
    """Return where a checkpoint's files are: at its path, or set aside if its writer died between the two renames.

    Raises:
        CheckpointError: its parent cannot be read.
    """
    path = _follow_link(path)
    try:
        replaced = [] if path.exists() else _replaced(path)
    except OSError as error:
        raise CheckpointError(f"no checkpoint at {path}: {error.strerror}") from error
    return replaced[-1] if replaced else path


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Make the folder in which a checkpoint is written, and remove it if the body fails.

    Leftovers of dead writers in the same parent are removed first: the disk may be full of them.

    Raises:
        OSError: it cannot be made.
        CheckpointError: something else than a checkpoint is at `path`.
    """
    path = _follow_link(path)
    if path.exists():
        _check_is_checkpoint(path)
    make_folder(path.parent)
    remove_leftovers(path.parent)
    partial, descriptor = _make_locked(path)
    try:
        yield partial
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def replace_folder(partial: Path, path: Path) -> None:
    """Rename a complete folder to its path and flush that; the one that it replaces is removed afterwards.

    Raises:
        OSError: it could not be renamed; what was at `path` is still there, or there again.
    """
    path, old = _follow_link(path), None
    if path.exists():
        # a folder cannot be renamed over one that is not empty, so the old one is set aside first
        old = _new_sibling(path, "replaced")
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    flush(path.parent)
    for replaced in _replaced(path):
        shutil.rmtree(replaced, ignore_errors=True)


def is_file_name(name: str) -> bool:
    """Return whether a checkpoint may have a file of that name.

    >>> is_file_name("tensors-00001-of-00002.safetensors"), is_file_name("../mine.safetensors")
    (True, False)
    """
    return _FILE.fullmatch(name) is not None


def _follow_link(path: Path) -> Path:
    # a renamed folder would replace the link, perhaps on another disk
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def _check_is_checkpoint(path: Path) -> None:
    """Raise unless a folder is a checkpoint, complete or not, or empty.

    Raises:
        OSError: it does not exist, or cannot be read.
        CheckpointError: it is something else, which a mistaken path must not cost anybody.
    """
    names = {entry.name for entry in path.iterdir()}
    if not {MANIFEST, TENSORS} <= names and not all(map(_FILE.fullmatch, names)):
        other = min(name for name in names if not _FILE.fullmatch(name))
        raise CheckpointError(
            f'{path} is no checkpoint, for it holds "{other}"; give a path of its own, such as {path / "last"}'
        )


def _new_sibling(path: Path, kind: Literal["partial", "replaced"]) -> Path:
    if not path.name:
        raise CheckpointError(
            f"a checkpoint is a folder with a name, {path} has none; give a path such as {path / 'last'}"
        )
    return path.with_name(f".{path.name}.{kind}-{uuid4().hex}")


def _replaced(path: Path) -> list[Path]:
    """Return the folders that were set aside from `path` and not removed, the latest last."""
    leftovers = [(entry, _LEFTOVER.fullmatch(entry.name)) for entry in path.parent.glob(".*.replaced-*")]
    own = [entry for entry, leftover in leftovers if leftover is not None and leftover["name"] == path.name]
    return sorted(own, key=lambda entry: entry.stat().st_mtime_ns)


def _make_locked(path: Path) -> tuple[Path, int]:
    """Make a partial folder beside `path`; return it, and the descriptor that holds its lock."""
    while True:
        # on the same file system, so that the last move is a rename
        partial = _new_sibling(path, "partial")
        partial.mkdir()
        with suppress(FileNotFoundError):
            descriptor = os.open(partial, os.O_RDONLY)
            if lock(descriptor) is not False and partial.exists():
                return partial, descriptor
            os.close(descriptor)
        # another writer took it for a leftover before it was locked


def _remove_unless_locked(folder: Path) -> None:
    """Remove a folder, unless a living process holds its lock, or may: not every file system has locks."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            # locked until it is removed, so that a writer that has just made it finds out
            if lock(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
