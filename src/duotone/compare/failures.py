"""From what went wrong to why an arm has no result, as its row says it."""

import signal

import torch

from duotone.compare.records import Failure
from duotone.errors import ArmError, CompareError, DuotoneError, LossScaleCollapse, NonFiniteLoss, PolicyError
from duotone.train.task import first_line

# failures that another attempt may not have: memory is free again, a library was installed, a file mended
RETRYABLE = frozenset({"error", "out of memory", "not installed"})
# what torch and its libraries say where no error class does
_ALLOCATION = (
    "can't allocate memory",
    "not enough memory",
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


class WorkerFailed(DuotoneError):
    """A process of an arm that could not do what it was asked.

    Attributes:
        failure: why.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def failure_of(error: Exception) -> Failure:
    """Return what an error means for the arm that raised it.

    >>> failure_of(ZeroDivisionError("division by zero"))
    Failure(kind='error', reason='ZeroDivisionError: division by zero')
    >>> failure_of(MemoryError()).kind
    'out of memory'
    """
    if isinstance(error, WorkerFailed):
        return error.failure
    kind, line = "error", first_line(error)
    match error:
        case ArmError():
            kind = error.kind
        case PolicyError() | CompareError():
            kind = "not possible"
        case NonFiniteLoss() | LossScaleCollapse():
            kind = "not finite"
        case torch.OutOfMemoryError() | MemoryError():
            kind, line = "out of memory", line or "an allocation failed"
        case RuntimeError() if any(words in str(error) for words in _ALLOCATION):
            kind = "out of memory"
        case _ if not isinstance(error, DuotoneError):
            line = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return Failure(kind, line)


def failure_of_death(exit_code: int | None, log: str) -> Failure:
    """Return what it means that a process has ended by itself.

    Args:
        exit_code: a signal's number below zero, as multiprocessing has it.
        log: the file that it printed to.

    >>> failure_of_death(3, "logs/bf16-trial.log").reason
    'its process ended with exit code 3; what it printed is in logs/bf16-trial.log'
    """
    # Windows knows no SIGKILL
    killed = getattr(signal, "SIGKILL", None)
    if killed is not None and exit_code == -killed:
        return Failure("out of memory", "its process was killed, as systems do when memory runs out")
    end = f"exit code {exit_code}"
    if exit_code is not None and exit_code < 0:
        end = next((each.name for each in signal.Signals if each == -exit_code), f"signal {-exit_code}")
    return Failure("error", f"its process ended with {end}; what it printed is in {log}")
