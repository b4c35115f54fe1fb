"""Modes that torch.utils.checkpoint enters again: once, for the functions it runs now, and no others."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from duotone.torch.casting.recomputation import follow_checkpoint

KINDS = pytest.mark.parametrize("reentrant", [False, True])


class Following(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*follow_checkpoint(self, func, args), **(kwargs or {}))


class NotFollowing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def x() -> Tensor:
    return torch.ones(3, requires_grad=True)


def stack() -> list[TorchFunctionMode]:
    return list(_get_current_function_mode_stack())


@KINDS
def test_a_mode_is_entered_again_once_and_no_other(reentrant):
    seen, (outer, inner, other) = [], (Following(), Following(), NotFollowing())

    def part(data: Tensor) -> Tensor:
        seen.append(stack())
        return data.exp().sin().cos()

    with outer, other, inner:
        result = checkpoint(part, x(), use_reentrant=reentrant)
    assert seen[0] == [outer, other, inner]
    result.sum().backward()
    assert len(seen) == 2
    assert len(seen[1]) == 2
    assert set(seen[1]) == {outer, inner}
    assert stack() == []


@KINDS
def test_two_parts_keep_to_their_own_modes(reentrant):
    seen: dict[str, list[int]] = {"within": [], "outside": []}

    def part(name: str, data: Tensor) -> Tensor:
        seen[name].append(len(stack()))
        return data.exp().sin()

    with Following():
        within = checkpoint(part, "within", x(), use_reentrant=reentrant)
    checkpoint(part, "outside", within, use_reentrant=reentrant).sum().backward()
    assert seen == {"within": [1, 1], "outside": [0, 0]}


@KINDS
def test_an_error_in_the_second_run_leaves_no_mode(reentrant):
    runs = []

    def part(data: Tensor) -> Tensor:
        runs.append(len(stack()))
        result = data.exp()
        if len(runs) == 2:
            raise ArithmeticError
        return result.sin()

    with Following():
        result = checkpoint(part, x(), use_reentrant=reentrant)
    with pytest.raises(ArithmeticError):
        result.sum().backward()
    assert runs == [1, 1]
    assert stack() == []


def test_hooks_of_others_are_left_alone():
    def pack(tensor: Tensor) -> Tensor:
        return tensor if filled else later

    filled = True
    with Following(), saved_tensors_hooks(pack, lambda tensor: tensor):
        # the hook's own variable has no value yet when the mode sees the hook
        assert x().exp().requires_grad
    later = x()
    with Following(), saved_tensors_hooks(lambda tensor: (tensor,), lambda packed: packed[0]):
        data = x()
        data.exp().sum().backward()
    assert torch.equal(data.grad, data.exp())


@KINDS
def test_without_gradients_there_is_nothing_to_follow(reentrant):
    with Following(), torch.no_grad():
        assert not checkpoint(torch.exp, x(), use_reentrant=reentrant).requires_grad
