"""What the tests of duotone.torch share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    """Return a function that compares dtype, shape and bits, so that -0 is not 0 and a NaN is itself."""

    def compare(first: Tensor, second: Tensor) -> bool:
        integer = _INTEGERS[first.element_size()]
        return first.dtype == second.dtype and torch.equal(first.detach().view(integer), second.detach().view(integer))

    return compare


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
