"""Cross-entropy of 16-bit logits: the bits of FP32 logits' loss, without FP32 logits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from duotone.torch.casting.float32_inside import cross_entropy
from duotone.torch.casting.float32_inside.cross_entropy import cross_entropy_in_float32

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
SHAPES = [(5,), (64, 10), (300, 33), (16, 1000), (4, 7, 5), (3, 21, 17, 19), (1, 5, 40, 31), (2, 3, 4, 5, 6), (7, 1)]


@pytest.fixture
def small_chunks(monkeypatch) -> Iterator[None]:
    """Have everything go through chunks of 700 logits, of 64 places at least, on one thread."""
    monkeypatch.setattr(cross_entropy, "_SMALL", 0)
    monkeypatch.setattr(cross_entropy, "_ELEMENTS_OF_A_THREAD", 700)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loss_of(*args: Any, **kwargs: Any) -> Tensor:
    return cross_entropy_in_float32(F.cross_entropy, *args, **kwargs)


def by_hand(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.cross_entropy(logits.float(), *args, **kwargs)


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, targets of which a third is 1, and weights of the classes."""
    torch.manual_seed(0)
    classes, places = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
    target = torch.randint(0, classes, places)
    target = torch.where(torch.rand(places) < 0.3, min(1, classes - 1), target)
    return (4 * torch.randn(shape)).to(dtype), target, torch.rand(classes) + 0.1


def assert_same(same_bits: Callable[..., bool], logits: Tensor, *args: Any, **kwargs: Any) -> None:
    ours, theirs = logits.detach().requires_grad_(), logits.detach().requires_grad_()
    loss, expected = loss_of(ours, *args, **kwargs), by_hand(theirs, *args, **kwargs)
    assert loss.shape == expected.shape
    assert same_bits(loss, expected)
    direction = torch.randn(loss.shape)
    loss.backward(direction)
    expected.backward(direction)
    assert same_bits(ours.grad.contiguous(), theirs.grad.contiguous())
    with torch.no_grad():
        assert same_bits(loss_of(logits, *args, **kwargs), expected)


@HALVES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_and_its_gradient_have_the_bits_of_float32_logits(dtype, reduction, shape, small_chunks, same_bits):
    logits, target, weight = problem(shape, dtype)
    for options in ({}, {"weight": weight}, {"ignore_index": 1}, {"weight": weight, "ignore_index": 1}):
        # a mean of nothing, NaN, has a sign that nobody looks at
        if (target != options.get("ignore_index", -100)).any() or reduction != "mean":
            assert_same(same_bits, logits, target, reduction=reduction, **options)


def test_whole_chunks_and_a_small_loss_have_the_same_bits_too(monkeypatch, same_bits):
    logits, target, weight = problem((3000, 400), torch.bfloat16)
    assert logits.numel() > cross_entropy._SMALL
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss_of(logits.requires_grad_(), target, weight)
    # the logits themselves, targets, weights of classes and their sum
    assert sorted(x.numel() for x in kept) == [1, 400, 3000, logits.numel()]
    assert all(x.data_ptr() == logits.data_ptr() for x in kept if x.numel() == logits.numel())
    assert_same(same_bits, logits.detach(), target, weight.bfloat16().float())
    assert_same(same_bits, logits.detach()[:64], target[:64], weight)


class _Largest(TorchDispatchMode):
    """Notes the most elements that an FP32 result has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.dtype == torch.float32:
                self.most = max(self.most, x.numel())
        return result


@pytest.mark.parametrize("shape", [(64, 100), (2, 10, 20, 40)], ids=str)
def test_no_more_than_a_chunk_is_ever_in_float32(shape, small_chunks):
    logits, target, weight = problem(shape, torch.bfloat16)
    logits.requires_grad_()
    with _Largest() as seen:
        loss_of(logits, target, weight).backward()
    assert 500 < seen.most <= 1600
    with _Largest() as seen:
        by_hand(logits, target, weight).backward()
    assert seen.most == logits.numel()


def test_logits_in_another_order_of_memory(small_chunks, same_bits):
    logits, target, weight = problem((2, 10, 20, 40), torch.bfloat16)
    assert_same(same_bits, logits.contiguous(memory_format=torch.channels_last), target, weight)
    flat, target, weight = problem((64, 100), torch.float16)
    assert_same(same_bits, flat.T.contiguous().T, target, weight)
    assert_same(same_bits, flat[::2], target[::2], weight)
    assert_same(same_bits, flat[:1].expand(64, 100), target, weight)


@pytest.mark.parametrize("shape", [(0, 5), (2, 3, 0), (0, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_add_up(shape, reduction, small_chunks):
    logits, target, weight = problem(shape, torch.bfloat16)
    loss, expected = (call(logits, target, weight, reduction=reduction) for call in (loss_of, by_hand))
    torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mean_of_ignored_rows_is_nan_and_their_sum_zero(weighted, small_chunks):
    logits, target, weight = problem((64, 100), torch.bfloat16)
    target, weight = torch.full_like(target, -100), weight if weighted else None
    assert loss_of(logits, target, weight).isnan()
    logits.requires_grad_()
    loss = loss_of(logits, target, weight, reduction="sum")
    assert loss == 0
    loss.backward()
    assert not logits.grad.any()


def test_what_is_not_finite_shows(small_chunks):
    for value in (torch.inf, torch.nan):
        logits, target, _ = problem((64, 100), torch.float16)
        logits[3, 4] = value
        loss = loss_of(logits, target, reduction="none")
        assert loss.isnan().nonzero().tolist() == [[3]]
    logits[3, 4] = -torch.inf
    assert torch.equal(loss_of(logits, target), by_hand(logits, target))


@HALVES
def test_the_rest_runs_on_widened_operands(dtype, small_chunks, same_bits):
    logits, target, weight = problem((64, 100), dtype)
    likely = logits.softmax(1)
    assert same_bits(loss_of(logits, target, label_smoothing=0.1), by_hand(logits, target, label_smoothing=0.1))
    assert same_bits(loss_of(logits, likely), by_hand(logits, likely.float()))
    assert same_bits(
        loss_of(logits.float(), target, weight.to(dtype)), by_hand(logits, target, weight.to(dtype).float())
    )
    assert same_bits(loss_of(logits, target, weight.to(dtype)), by_hand(logits, target, weight.to(dtype).float()))
    with pytest.warns(UserWarning, match="reduction='sum'"):
        legacy = loss_of(logits, target, None, False)
    assert same_bits(legacy, by_hand(logits, target, reduction="sum"))


def test_bad_input_is_refused_as_by_torch(small_chunks):
    logits, target, weight = problem((64, 100), torch.bfloat16)
    image, places, _ = problem((2, 10, 20, 40), torch.bfloat16)
    for args, options in (
        ((logits, target + 100), {}),
        ((logits, target - 200), {"ignore_index": -1}),
        ((image, places + 10), {}),
        ((logits, target, weight[1:]), {}),
        ((logits, target[1:]), {}),
        ((logits, logits.long()), {}),
        ((logits, target), {"reduction": "median"}),
    ):
        with pytest.raises((IndexError, RuntimeError, ValueError)) as theirs:
            by_hand(*args, **options)
        with pytest.raises(theirs.type, match=str(theirs.value).split()[0]):
            loss_of(*args, **options)


def test_second_derivatives_transforms_and_compiled_code(small_chunks):
    logits, target, weight = problem((16, 100), torch.bfloat16)

    def loss(x: Tensor, call: Callable[..., Tensor] = loss_of) -> Tensor:
        return call(x.bfloat16(), target, weight).pow(2)

    x = logits.float().requires_grad_()
    first, expected = (torch.autograd.grad(loss(x, call), x, create_graph=True)[0] for call in (loss_of, by_hand))
    assert torch.equal(first, expected)
    second, expected_second = (torch.autograd.grad(grad.pow(2).sum(), x)[0] for grad in (first, expected))
    assert second.any()
    # its terms are rounded before they are added
    torch.testing.assert_close(second, expected_second, rtol=0.01, atol=0.01)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected, rtol=0.01, atol=1e-5)
    each = torch.func.vmap(torch.func.grad(lambda row, place: loss_of(row[None], place[None])))(logits, target)
    torch.testing.assert_close(each, torch.func.vmap(torch.func.grad(by_hand))(logits, target), rtol=0.01, atol=1e-4)
    (compiled,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), x)
    torch.testing.assert_close(compiled, expected, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_losses(reentrant, small_chunks, same_bits):
    logits, target, _ = problem((64, 100), torch.bfloat16)
    grads = []
    for call in (lambda x: checkpoint(loss_of, x, target, use_reentrant=reentrant), lambda x: loss_of(x, target)):
        leaf = logits.clone().requires_grad_()
        call(leaf).backward()
        grads.append(leaf.grad)
    assert same_bits(*grads)


@pytest.mark.parametrize("shape", [(64, 100), (2, 10, 20, 40)], ids=str)
@pytest.mark.parametrize("holds", [False, True])
def test_the_gradient_is_written_over_logits_that_nobody_else_can_reach(shape, holds, small_chunks, same_bits):
    logits, target, weight = problem(shape, torch.bfloat16)
    leaf, held, seen = logits.float().requires_grad_(), [], []

    def loss() -> Tensor:
        narrow = leaf.bfloat16()
        seen.append(narrow.data_ptr())
        narrow.register_hook(lambda grad: seen.append(grad.data_ptr()))
        if holds:
            held.append(narrow)
        return loss_of(narrow, target, weight)

    loss().backward()
    assert (seen[0] == seen[1]) is not holds
    expected = logits.detach().requires_grad_()
    by_hand(expected, target, weight).backward()
    assert same_bits(leaf.grad.bfloat16(), expected.grad)
    assert not holds or same_bits(held[0], logits)
