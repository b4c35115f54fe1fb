"""What an error, or a death, means for an arm."""

import pytest
import torch

from duotone.compare.failures import WorkerFailed, failure_of, failure_of_death
from duotone.compare.records import Failure
from duotone.errors import ArmError, CompareError, LossScaleCollapse, NonFiniteLoss, PolicyError


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ArmError("no optimi here", kind="not installed"), Failure("not installed", "no optimi here")),
        (ArmError("no lion there"), Failure("not possible", "no lion there")),
        (NonFiniteLoss("nan"), Failure("not finite", "nan")),
        (LossScaleCollapse("at its floor"), Failure("not finite", "at its floor")),
        (PolicyError("no"), Failure("not possible", "no")),
        (CompareError("not here"), Failure("not possible", "not here")),
        (KeyError("x"), Failure("error", "KeyError: 'x'")),
        (ValueError(), Failure("error", "ValueError")),
        (RuntimeError("one\ntwo"), Failure("error", "RuntimeError: one")),
        (torch.OutOfMemoryError("CUDA out of memory"), Failure("out of memory", "CUDA out of memory")),
        (WorkerFailed(Failure("too slow", "23 times")), Failure("too slow", "23 times")),
    ],
)
def test_errors_have_a_kind_and_a_line(error: Exception, failure: Failure) -> None:
    assert failure_of(error) == failure


def test_torch_without_memory_on_a_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    assert failure_of(raised.value).kind == "out of memory"


def test_a_killed_process_ran_out_of_memory_and_another_end_is_an_error() -> None:
    assert failure_of_death(-9, "log").kind == "out of memory"
    assert failure_of_death(-11, "log") == Failure("error", "its process ended with SIGSEGV; what it printed is in log")
    assert "exit code 0" in failure_of_death(0, "log").reason


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"]
)
def test_libraries_of_a_gpu_without_memory_are_recognised(text: str) -> None:
    assert failure_of(RuntimeError(text)) == Failure("out of memory", text)
