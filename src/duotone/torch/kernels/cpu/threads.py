"""Running one kernel on as many threads as torch uses: torch's own, where its OpenMP is GNU's, else Python's.

Torch's threads wait in a loop for a while after each of its operations, so threads of another pool would have to
share the cores with them. The work of a job is cut into pieces of about equal length that threads take from a common
counter.
"""

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

# elements of a piece at least, but for the last one: long against a thread's way to the counter, short against a step
_PIECE = 32768
# what a chunk costs besides its elements
_CHUNK_COST = 256


def pieces_of(lengths: np.ndarray) -> np.ndarray:
    """Return where pieces begin among chunks of these lengths, and at last the number of chunks; int64.

    >>> pieces_of(np.array([10, 10, 32768, 20000, 20000])).tolist()
    [0, 3, 5]
    """
    ends = np.cumsum(lengths + _CHUNK_COST)
    starts = [0]
    while starts[-1] < lengths.size:
        before = ends[starts[-1] - 1] if starts[-1] else 0
        starts.append(min(int(np.searchsorted(ends, before + _PIECE)) + 1, lengths.size))
    return np.array(starts, dtype=np.int64)


def run_on_threads(entry: Any, job: int, pieces: int) -> None:
    """Call a kernel, as `machine_code` returns it, on torch's number of threads, or fewer if there are fewer pieces."""
    threads = min(torch.get_num_threads(), pieces)
    parallel = _openmp()
    if threads <= 1:
        entry(job)
    elif parallel is not None:
        parallel(ctypes.cast(entry, ctypes.c_void_p), job, threads, 0)
    else:
        others = [_pool(threads - 1).submit(entry, job) for _ in range(threads - 1)]
        entry(job)
        for other in others:
            other.result()


@cache
def _openmp() -> Callable[..., None] | None:
    """Return GNU OpenMP's `GOMP_parallel(function, argument, threads, flags)` if torch runs on it."""
    if not sys.platform.startswith("linux") or "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        # by its name, which gives the copy that torch has loaded
        parallel = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="duotone")
