"""Files and folders that a crash cannot leave half-written: a text is replaced as a whole, a log grows by whole lines.

A text is written beside its place, flushed to the disk and renamed; whoever opens it reads the old text or the new.
A lock on a file ends with the process that holds it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in a folder that exists.

    Raises:
        OSError: it could not be written; the old text is untouched, and nothing half-written stays.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside a file, and put what the body writes there in the file's place; or nothing, if it fails.

    Raises:
        OSError: it could not be flushed or renamed; the old file is untouched, and nothing half-written stays.
    """
    partial = partial_path(path)
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def read_bounded(path: Path, most_bytes: int) -> str:
    """Return a file's text, which may not be longer than it can be in earnest: a link to a device has no end.

    Raises:
        OSError: it could not be read.
        ValueError: it is longer, or no UTF-8.

    >>> read_bounded(Path("/dev/zero"), 1000)
    Traceback (most recent call last):
    ValueError: it is longer than 1,000 bytes
    """
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it is longer than {most_bytes:,} bytes")
    return content.decode("utf-8-sig")


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, which is made if there is none; the line is on the disk after the next `flush`.

    Raises:
        OSError: it could not be written; no part of it stays.
    """
    rest = f"{line}\n".encode()
    # unbuffered: nothing may be left to be written when the file is closed
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and flush the entry of each new one to the disk.

    Raises:
        OSError: one of them cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    flush(*(folder.parent for folder in missing))


def partial_path(path: Path) -> Path:
    """Return where a text is written before it is renamed; the next write goes over what a crash left there."""
    return path.with_name(f".{path.name}.partial")


def flush(*paths: Path) -> None:
    """Wait until files, or the entries of folders, are on the disk.

    Raises:
        OSError: one does not exist, or the disk fails.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(descriptor: int) -> bool | None:
    """Lock an open file for this process, without waiting.

    Args:
        descriptor: of the file; closing it, or the process's end, gives the lock back.

    Returns:
        Whether the lock was free; None where the file system has no locks.
    """
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
