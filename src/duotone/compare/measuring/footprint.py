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
        without_model_bytes: what was taken without the model when it began; None where the system does not tell peaks.
    """

    device: torch.device
    without_model_bytes: int | None

    def begin_again(self) -> None:
        """Forget the peak until now, and count from what is taken now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_peak()

    def peak_bytes(self) -> int | None:
        """Return the peak until now; None on systems that do not tell."""
        if self.without_model_bytes is None:
            return None
        is_cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if is_cuda else _resident_bytes("VmHWM")
        return max(0, peak - self.without_model_bytes)


def begin_footprint(model: nn.Module, device: torch.device) -> Footprint:
    """Begin to measure, with a fresh model in memory, on the CPU.

    >>> model = nn.Linear(512, 512)
    >>> footprint = begin_footprint(model, torch.device("cpu"))
    >>> activations = torch.ones(6000, 6000)
    >>> peak = footprint.peak_bytes()
    >>> peak is None or peak >= 100_000_000
    True
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        # workspaces of libraries, which the warm-up has filled
        return Footprint(device, torch.cuda.memory_allocated(device))
    _return_free_heap()
    if not _reset_peak():
        return Footprint(device, None)
    tensors = [each for each in (*model.parameters(), *model.buffers()) if not is_lazy(each)]
    model_bytes = sum(each.numel() * each.element_size() for each in tensors)
    return Footprint(device, _resident_bytes("VmRSS") - model_bytes)


def _resident_bytes(name: str) -> int:
    """Return a line of the process's status in bytes."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _reset_peak() -> bool:
    """Let the peak begin anew from what is resident now; return False where the system does not, as only Linux does."""
    try:
        _REFERENCES.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _return_free_heap() -> None:
    """Have the C library give back what it keeps for later, or the model would use it unseen; glibc alone can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
