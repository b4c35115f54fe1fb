"""Whose memory a backward pass may write over: that of a tensor which nobody else can reach, and no other's."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from duotone.torch.internals import sharing
from duotone.torch.internals.sharing import may_write_over


class Square(torch.autograd.Function):
    """Squares, and notes whether what it has saved may be written over in its backward pass."""

    answers: list[bool] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        Square.answers.append(may_write_over(x))
        return 2 * x * grad


def answer(made, *, hold=lambda x: None, backward=lambda y: y.sum().backward(), call=None) -> bool:
    """Return what is said of a tensor that `made` makes, while what `hold` returns of it is held."""
    Square.answers.clear()
    leaf = torch.randn(3, 4, requires_grad=True)

    def loss() -> tuple[Tensor, object]:
        x = made(leaf)
        return (call or Square.apply)(x), hold(x)

    result, _held = loss()
    backward(result)
    (said,) = Square.answers
    return said


PLAIN = lambda leaf: leaf * 2  # noqa: E731
VIEW = lambda leaf: (leaf.view(1, 3, 4) * 2).flatten(0, 1)  # noqa: E731


@pytest.mark.parametrize("made", [PLAIN, VIEW], ids=["plain", "view"])
def test_what_nobody_else_has(made):
    assert answer(made)
    # in a second call of the same, too
    assert answer(made)
    assert answer(made, backward=lambda y: torch.autograd.backward(y, torch.ones(3, 4)))
    assert answer(made, hold=lambda x: x.clone())


@pytest.mark.parametrize("made", [PLAIN, VIEW], ids=["plain", "view"])
@pytest.mark.parametrize(
    "hold",
    [
        lambda x: x,
        lambda x: x.detach(),
        lambda x: x[0],
        lambda x: x.untyped_storage(),
        lambda x: x.detach().numpy(),
        lambda x: x._base if x._base is not None else x,
        lambda x: lambda: x,
        # saved by another function
        lambda x: x.exp() + x * x,
        lambda x: x.view(-1).sin(),
    ],
    ids=["itself", "detached", "part", "memory", "array", "base", "closure", "function", "function of a view"],
)
def test_what_somebody_has(made, hold):
    assert not answer(made, hold=hold)


def test_what_is_needed_again():
    assert not answer(PLAIN, backward=lambda y: y.sum().backward(retain_graph=True))
    assert not answer(torch.tanh)
    # a leaf, an expanded tensor, and one in another order
    assert not answer(lambda leaf: leaf)
    assert not answer(lambda leaf: (leaf * 2)[:1].expand(3, 4))
    assert not answer(lambda leaf: (leaf * 2).t())


def test_beside_hooks_on_saved_tensors(monkeypatch):
    # what is unpacked is a copy, or is computed again: in either case the right numbers are what counts
    monkeypatch.setattr(sharing, "_alone", {})
    with save_on_cpu():
        answer(PLAIN)
    assert answer(PLAIN)
    for reentrant in (False, True):
        answer(PLAIN, call=lambda x, reentrant=reentrant: checkpoint(Square.apply, x, use_reentrant=reentrant))
    assert answer(VIEW)


@pytest.mark.parametrize("name", ["_use_count", "_storage_use_count"])
def test_without_torchs_counts_nothing_is_written_over(name, monkeypatch):
    monkeypatch.setattr(sharing, name, None)
    assert not answer(PLAIN)
