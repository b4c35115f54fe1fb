"""What the tests of duotone.torch share."""

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from duotone.errors import DuotoneWarning

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    """Return a function that compares dtype, shape and bits, so that -0 is not 0 and a NaN is itself."""

    def compare(first: Tensor, second: Tensor) -> bool:
        integer = _INTEGERS[first.element_size()]
        return first.dtype == second.dtype and torch.equal(first.detach().view(integer), second.detach().view(integer))

    return compare


@pytest.fixture
def calls_in() -> Callable[[Callable[[], object]], int]:
    """Return a function that counts the calls, of functions in Python and in C, that Python code makes in a function.

    Unlike time, that is the same on every machine; it is not the same for every version of torch and Python. Garbage
    of other tests is collected before, for its finalizers would be counted.
    """

    def count(function: Callable[[], object]) -> int:
        calls = 0

        def note(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        before = sys.getprofile()
        gc.collect()
        gc.disable()
        sys.setprofile(note)
        try:
            function()
        finally:
            sys.setprofile(before)
            gc.enable()
        return calls

    return count


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Have torch fill the memory that `torch.empty` returns with NaN, so that reading it unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def said(request: pytest.FixtureRequest) -> Iterator[Callable[[], list[str]]]:
    """Return a function that returns what Duotone has warned of, which has to name lines of the test's own file.

    What it says of CPUs without FP16 products is left out, for that depends on the machine.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def messages() -> list[str]:
            ours = [each for each in caught if issubclass(each.category, DuotoneWarning)]
            texts = [str(each.message) for each in ours]
            assert {each.filename for each in ours} <= {str(request.path)}
            return [text for text in texts if "this CPU has no FP16" not in text]

        yield messages
