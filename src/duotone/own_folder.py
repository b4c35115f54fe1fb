"""A folder that belongs to one run, or to something else that has one of its own, and to one process at a time.

The lock is `flock`'s on the file `.lock`, which says who holds it and since when, and is removed with it. It ends with
its holder, however that ends: what a killed process left is no lock. Left out: Windows and file systems without locks,
where nothing is locked. https://man7.org/linux/man-pages/man2/flock.2.html
"""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import cache
from itertools import count
from pathlib import Path

from duotone.durable_files import lock, make_folder, partial_path
from duotone.errors import FolderError

LOCK = ".lock"
# a file system's names have 255 bytes, and a number follows
_MOST_STEM = 120
_MOST_HOLDER_BYTES = 1000
# the descriptors of this process's locks
_held: set[int] = set()


def obstacle(folder: Path, first_file: str, what: str) -> str | None:
    """Return why a new run, or something else that has a folder of its own, cannot start in a folder; None if it can.

    Args:
        folder: where it would start.
        first_file: the name of the file that it writes first; what a crash left of it is no obstacle.
        what: that starts, such as "run".

    >>> obstacle(Path("no such folder"), "settings.yaml", "run") is None
    True
    """
    first = folder / first_file
    try:
        if folder.exists() and not folder.is_dir():
            return f"{folder} is a file; choose another --out"
        if not folder.exists() or {*folder.iterdir()} <= {partial_path(first), folder / LOCK}:
            return None
        contents = f"another {what}" if first.exists() else "other files"
    except (OSError, ValueError) as error:
        return f"cannot read {folder}: {getattr(error, 'strerror', error)}; choose another --out"
    return f"{folder} holds {contents}; choose another --out, or go on with a {what} by --resume"


def next_free_folder(root: Path, stem: str) -> Path:
    """Return `root/<stem>-<n>` with the lowest n that is free; of a long stem the beginning.

    >>> next_free_folder(Path("no such folder"), "digits").name
    'digits-1'
    """
    return next(path for number in count(1) if not os.path.lexists(path := root / f"{stem[:_MOST_STEM]}-{number}"))


@contextmanager
def made_next(root: Path, stem: str) -> Iterator[Path]:
    """Make the folder that `next_free_folder` returns, which no other process then gets; removed if it stays empty.

    Raises:
        FolderError: it cannot be made.
    """
    with ExitStack() as stack:
        with _write_errors(root):
            stack.enter_context(_removing_empty(root))
            make_folder(root)
            while True:
                folder = next_free_folder(root, stem)
                stack.enter_context(_removing_empty(folder))
                # another process may be quicker
                with suppress(FileExistsError):
                    folder.mkdir()
                    break
        yield folder


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Hold a folder's lock for the length of a block. The folder is made, and removed at the end if it is empty.

    Raises:
        FolderError: another process holds it, or the folder cannot be made or written to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root, locked(Path(root, "run")):
    ...     with locked(Path(root, "run")):
    ...         pass
    Traceback (most recent call last):
    duotone.errors.FolderError: .../run is in use by process ... on ..., since ...; wait until that has ended, or ...
    """
    with ExitStack() as stack:
        with _write_errors(folder):
            stack.enter_context(_removing_empty(folder))
            make_folder(folder)
            stack.callback(_release, folder / LOCK, _take(folder))
        yield folder


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise FolderError(f"cannot write to {folder}: {reason}; choose another --out") from error


@contextmanager
def _removing_empty(folder: Path) -> Iterator[None]:
    """Remove a folder and its parents at the end of a block, if they were not there before it and are empty."""
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        yield
    finally:
        # of a name that no folder can have, there is nothing to remove
        with suppress(OSError, ValueError):
            for each in made:
                each.rmdir()


def _take(folder: Path) -> int:
    """Return the descriptor that holds a folder's lock."""
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if lock(descriptor) is False:
                # a holder that has just begun may not have written yet
                holder = os.pread(descriptor, _MOST_HOLDER_BYTES, 0).decode(errors="replace") or "another process"
                raise FolderError(f"{folder} is in use by {holder}; wait until that has ended, or choose another --out")
            # the one before may have removed the file meanwhile
            if _is_at(descriptor, folder / LOCK):
                _write_holder(descriptor)
                _let_go_in_forks()
                _held.add(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _release(path: Path, descriptor: int) -> None:
    if descriptor not in _held:
        # a fork, whose parent holds it
        return
    _held.discard(descriptor)
    with suppress(OSError):
        path.unlink()
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _write_holder(descriptor: int) -> None:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    # a full disk takes the words, not the lock
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())


@cache
def _let_go_in_forks() -> None:
    """Have processes that this one forks, to load data for instance, let go: a lock would outlive its holder there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()
