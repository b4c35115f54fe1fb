"""How much memory training takes, beyond the process that does it.

A CPU: the peak resident set from the moment the model is there, less the resident set without the model. Counted are
weights, gradients, optimizer state, activations and whatever an operation needs for itself, as the system sees them,
in pages. Not counted: the interpreter, libraries, kernels compiled before, and the task's data. What the heap had free
before is used unseen, so a few megabytes may be missing.
A GPU: the peak of torch's allocator; neither the context nor what it holds in reserve. It is exact.
"""

import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Footprint:
    """A measurement that has begun.

    Attributes:
        device: where the model trains.
        without_model_bytes: the resident set less the model, when it began.
    """

    device: torch.device
    without_model_bytes: int

    def peak_bytes(self) -> int | None:
        """Return the peak until now; None on systems that do not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = _resident_bytes("VmHWM")
        return None if peak is None else max(0, peak - self.without_model_bytes)


def begin_footprint(model: nn.Module, device: torch.device) -> Footprint:
    """Begin to measure, with a fresh model in memory, on the CPU.

    >>> model = nn.Linear(512, 512)
    >>> footprint = begin_footprint(model, torch.device("cpu"))
    >>> copies = [torch.ones(1024, 1024) for _ in range(8)]
    >>> peak = footprint.peak_bytes()
    >>> peak is None or peak >= 8 * 4 * 1024 * 1024
    True
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return Footprint(device, 0)
    _return_free_heap()
    _reset_peak()
    tensors = [each for each in (*model.parameters(), *model.buffers()) if not is_lazy(each)]
    model_bytes = sum(each.numel() * each.element_size() for each in tensors)
    return Footprint(device, (_resident_bytes("VmRSS") or 0) - model_bytes)


def _resident_bytes(name: str) -> int | None:
    """Return a line of the process's status in bytes; where there is none, the peak since the process began."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> None:
    """Let the peak begin anew from what is resident now; where the system does not, it stays that of the process."""
    try:
        _REFERENCES.write_text("5", encoding="ascii")
    except OSError:
        return


def _return_free_heap() -> None:
    """Have the C library give back what it keeps for later, or the model would use it unseen; glibc alone can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
