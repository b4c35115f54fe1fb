"""The place of a checkpoint among its siblings, and what a writer that died left beside it.

A folder is written as `.NAME.partial-TOKEN` and renamed to `NAME`. One that is there already steps aside first, as
`.NAME.replaced-TOKEN`; a process that dies between those two renames leaves no `NAME`, and `standing` finds the one
that stepped aside. A lock on the partial folder, which ends with its process, tells a writer at work from a dead one.
A link is followed, and nothing but a checkpoint, or an empty folder, is ever replaced or removed.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from duotone.errors import CheckpointError

MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-[0-9a-f]{32}", re.DOTALL)
_FILE = re.compile(r"manifest\.json|tensors(-\d+-of-\d+)?\.safetensors")


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints in a folder by name, intact or not; none if there is no such folder.

    Raises:
        CheckpointError: the folder cannot be read.

    >>> list_checkpoints("no/such/folder")
    []
    """
    folder = Path(folder)
    try:
        entries = list(folder.iterdir()) if folder.exists() else []
        found = {entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoints in {folder}: {error.strerror}") from error
    for entry in entries:
        leftover = _LEFTOVER.fullmatch(entry.name)
        if leftover is not None and leftover["kind"] == "replaced":
            found.add(folder / leftover["name"])
    return sorted(found)


def remove_checkpoint(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint, all at once for whoever looks for it.

    Raises:
        CheckpointError: it is not there, is a link or no checkpoint, or cannot be removed.

    >>> remove_checkpoint("no/such/folder")
    Traceback (most recent call last):
    duotone.errors.CheckpointError: cannot remove the checkpoint no/such/folder: No such file or directory
    """
    path = Path(path)
    if path.is_symlink():
        raise CheckpointError(f"cannot remove the checkpoint {path}: it is a link; remove what it points to")
    last = standing(path)
    try:
        _check_is_checkpoint(last)
        doomed = _beside(path, "partial")
        for aside in _replaced(path):
            if aside != last:
                shutil.rmtree(aside)
        last.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(f"cannot remove the checkpoint {path}: {error.strerror}") from error


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what writers that died left beside the checkpoints in a folder; every save does this first.

    What a living process writes stays, and so does what stepped aside from where nothing stands. What cannot be
    removed stays, too: this raises nothing.

    >>> remove_leftovers("no/such/folder")
    """
    folder = Path(folder)
    for entry in folder.glob(".*-*"):
        leftover = _LEFTOVER.fullmatch(entry.name)
        if leftover is None:
            continue
        if leftover["kind"] == "partial":
            _remove_unless_held(entry)
        elif (folder / leftover["name"]).exists():
            shutil.rmtree(entry, ignore_errors=True)


def standing(path: Path) -> Path:
    """Return where a checkpoint's files are: at its place, or aside if its writer died before the new one stood.

    Raises:
        CheckpointError: its parent cannot be read.
    """
    path = _followed(path)
    try:
        aside = [] if path.exists() else _replaced(path)
    except OSError as error:
        raise CheckpointError(f"no checkpoint at {path}: {error.strerror}") from error
    return aside[-1] if aside else path


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Make the folder in which a checkpoint is written, and remove it if the body fails to move it to its place.

    Leftovers of dead writers in the same parent are removed first: the disk may be full of them.

    Raises:
        OSError: it cannot be made.
        CheckpointError: something else than a checkpoint is at `path`.
    """
    path = _followed(path)
    if path.exists():
        _check_is_checkpoint(path)
    _make_durable(path.parent)
    remove_leftovers(path.parent)
    partial, descriptor = _made_and_held(path)
    try:
        yield partial
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def move_into_place(new: Path, place: Path) -> None:
    """Rename a complete folder to its place and flush that; one that is there is removed afterwards.

    Raises:
        OSError: it could not be moved; what was at `place` is there still, or again.
    """
    place, aside = _followed(place), None
    if place.exists():
        # a folder cannot be renamed over a full one, so the old one steps aside first
        aside = _beside(place, "replaced")
        place.rename(aside)
    try:
        new.rename(place)
    except OSError:
        if aside is not None:
            aside.rename(place)
        raise
    flush(place.parent)
    for old in _replaced(place):
        shutil.rmtree(old, ignore_errors=True)


def flush(*paths: Path) -> None:
    """Wait until files or the entries of folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _followed(path: Path) -> Path:
    # a renamed folder would take the place of the link, perhaps on another disk
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def _check_is_checkpoint(path: Path) -> None:
    """Raise unless a folder is a checkpoint, whole or not, or empty.

    Raises:
        OSError: it is not there, or cannot be read.
        CheckpointError: it is something else, which a mistaken path must not cost anybody.
    """
    names = {entry.name for entry in path.iterdir()}
    if not {MANIFEST, TENSORS} <= names and not all(map(_FILE.fullmatch, names)):
        other = sorted(name for name in names if not _FILE.fullmatch(name))[0]
        raise CheckpointError(
            f'{path} is no checkpoint, for it holds "{other}"; give a path of its own, such as {path / "last"}'
        )


def _beside(path: Path, kind: str) -> Path:
    if not path.name:
        raise CheckpointError(
            f"a checkpoint is a folder with a name, {path} has none; give a path such as {path / 'last'}"
        )
    return path.with_name(f".{path.name}.{kind}-{uuid4().hex}")


def _replaced(path: Path) -> list[Path]:
    """Return what stepped aside from `path` and was not removed, the latest last."""
    leftovers = [(entry, _LEFTOVER.fullmatch(entry.name)) for entry in path.parent.glob(".*.replaced-*")]
    asides = [entry for entry, leftover in leftovers if leftover is not None and leftover["name"] == path.name]
    return sorted(asides, key=lambda entry: entry.stat().st_mtime_ns)


def _make_durable(folder: Path) -> None:
    """Make a folder and its parents, and flush the entry of each new one."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        flush(*(path.parent for path in missing))


def _made_and_held(path: Path) -> tuple[Path, int]:
    """Make a partial folder beside a place; return it, and the descriptor that holds its lock."""
    while True:
        # on the same file system, so that the last move is a rename
        partial = _beside(path, "partial")
        partial.mkdir()
        with suppress(FileNotFoundError):
            descriptor = os.open(partial, os.O_RDONLY)
            if _lock(descriptor) is not False and partial.exists():
                return partial, descriptor
            os.close(descriptor)
        # another writer took it for a leftover before it was locked


def _remove_unless_held(folder: Path) -> None:
    """Remove a folder, unless a living process holds its lock, or may: not every file system has locks."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            # held until it is gone, so that whoever has just made it learns of it
            if _lock(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Return whether a lock was to be had; None where there are no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
