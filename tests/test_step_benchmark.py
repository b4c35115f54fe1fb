"""The benchmark of the step keeps to a part of a large tensor what needs several copies of it."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import step

    return step


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *[each.numel() for each in tree_leaves(result) if torch.is_tensor(each)]])
        return result


def test_large_tensors_are_checked_in_part(step, monkeypatch):
    assert step.at_most([[10**9], [10**9, 2], [50257, 768], [3, 0]]) == [[2**26], [2**25, 2], [50257, 768], [3, 0]]
    monkeypatch.setattr(step, "AT_ONCE", 100)
    with Largest() as largest:
        assert step.check([[10**6], [7, 10]], "cpu")["equal_to_reference_in_every_bit"]
    # the reference pads sums to chunks
    assert largest.numel <= 2**15


def test_a_large_copy_is_of_the_same_memory_again(step, monkeypatch):
    monkeypatch.setattr(step, "AT_ONCE", 100)
    with Largest() as largest:
        copy = step.copy_step(10**4, "cpu")
    assert largest.numel <= 8 * 100
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: copied.append(source.numel()))
    copy()
    # read once and written once, in 4 bytes
    assert sum(copied) * 8 == pytest.approx(step.BYTES_PER_PARAMETER * 10**4, rel=0.01)
