"""The source of Python's standard library as bytes: text that every machine with Python already has.

Files are ordered by the CRC-32 of their relative path, and the lowest twentieth is held out: whole files, the
same ones under every Python version that has them, in an order that mixes the library's parts. Reference
methods predict held-out bytes too, in bits per byte: -1/n * sum log2 p(byte | what the method sees). Left
out: any cleaning of the text.
"""

import lzma
import os
import platform
import sysconfig
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from duotone.errors import TaskError

Bytes = npt.NDArray[np.uint8]

HELD_OUT_FRACTION = 1 / 20
# tests repeat themselves, encodings and pydoc_data are tables, packages beside the library differ by machine
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
)
# between files, so that a model can see where one ends: no source file contains it
SEPARATOR = b"\0"
# what each symbol is counted as before any is seen, so that no held-out byte has probability 0
SMOOTHING = 0.1


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to judge by, uint8 of one dimension; `files` counts both."""

    train: Bytes
    held_out: Bytes
    files: int

    @property
    def facts(self) -> Mapping[str, str]:
        """What the text is, for people."""
        return {
            "text": f"the standard library of Python {platform.python_version()}, {self.files} files",
            "train": f"{len(self.train) / 1e6:.2f} MB",
            "held out": f"{len(self.held_out) / 1e6:.2f} MB, other files",
        }


def standard_library(root: Path | None = None) -> Corpus:
    """Read every source file of the standard library below `root`, by default the running interpreter's.

    Raises:
        TaskError: if there are too few sources to hold one out, as where Python is packed in a zip file.

    >>> corpus = standard_library()
    >>> corpus.train.dtype, len(corpus.train) > 10 * len(corpus.held_out) > 0
    (dtype('uint8'), True)
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    paths = source_files(root)
    train = [path for path in paths if not is_held_out(path)]
    held_out = [path for path in paths if is_held_out(path)]
    if not train or not held_out:
        raise TaskError(
            f"found {len(paths)} source files of the standard library in {root}, too few to train on; "
            "this Python is packed or stripped: use one that ships its sources, or a task of your own"
        )
    return Corpus(joined(root, train), joined(root, held_out), len(paths))


def source_files(root: Path) -> list[str]:
    """List the ordinary source files below `root` as relative POSIX paths, in the order of their CRC-32."""
    paths = []
    for folder, inner, names in os.walk(root):
        # not even looked into: packages beside the library may be many thousands of files
        inner[:] = [name for name in inner if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    # _sysconfigdata_*.py is how this one interpreter was built, as one dictionary
    ordinary = [path for path in paths if not path.startswith("_sysconfigdata")]
    return sorted(ordinary, key=lambda path: (zlib.crc32(path.encode()), path))


def is_held_out(path: str) -> bool:
    """Whether the file at this relative path is for evaluation.

    >>> [path for path in ("ast.py", "json/tool.py", "tarfile.py", "this.py") if is_held_out(path)]
    []
    """
    return zlib.crc32(path.encode()) < HELD_OUT_FRACTION * 2**32


def joined(root: Path, paths: list[str]) -> Bytes:
    """Concatenate files, each followed by `SEPARATOR`."""
    return np.frombuffer(b"".join((root / path).read_bytes() + SEPARATOR for path in paths), dtype=np.uint8)


def unigram_bits(train: Bytes, text: Bytes) -> float:
    """Bits per byte of `text[1:]` when each byte is predicted from its frequency in `train`.

    >>> round(unigram_bits(np.zeros(10**6, np.uint8), np.zeros(9, np.uint8)), 3)
    0.0
    """
    counts = np.bincount(train, minlength=256) + SMOOTHING
    return float(-np.log2(counts / counts.sum())[text[1:]].mean())


def bigram_bits(train: Bytes, text: Bytes) -> float:
    """Bits per byte of `text[1:]` when each byte is predicted from the one before it, as often as in `train`.

    >>> abab = np.array([97, 98] * 10**5, np.uint8)
    >>> round(unigram_bits(abab, abab), 2), round(bigram_bits(abab, abab), 2)
    (1.0, 0.0)
    """
    counts = np.bincount(pairs(train), minlength=256 * 256).reshape(256, 256) + SMOOTHING
    return float(-np.log2(counts / counts.sum(axis=1, keepdims=True)).ravel()[pairs(text)].mean())


def pairs(text: Bytes) -> npt.NDArray[np.uint16]:
    """Number each pair of neighbouring bytes: 256 times the first plus the second."""
    return np.left_shift(text[:-1], 8, dtype=np.uint16) | text[1:]


def xz_bits(text: Bytes) -> float:
    """Bits per byte of `text[1:]` compressed by `xz -9`, which has seen nothing else."""
    return 8 * len(lzma.compress(text[1:].tobytes(), preset=9)) / (len(text) - 1)
