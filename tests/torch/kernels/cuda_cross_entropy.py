"""Cross-entropy's kernels against FP64, on a GPU or in Triton's interpreter; `test_cuda.py` runs this."""

import gc
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from duotone.torch.casting.float32_inside import cross_entropy, fused_cross_entropy
from duotone.torch.casting.float32_inside.cross_entropy import cross_entropy_in_float32

pytest.importorskip("triton", reason="the cuda backend needs Triton")
from duotone.torch.kernels.cuda.cross_entropy import losses, write_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# a tile and less, and several, ragged and whole
SHAPES = [(5, 7), (1, 1), (3, 512), (4, 1000), (3, 4096), (2, 12_289)]


@pytest.fixture(autouse=True)
def through_the_kernels(monkeypatch):
    """Have every loss of rows go through the kernels, on a CPU too, where they are interpreted."""
    monkeypatch.setattr(cross_entropy, "_SMALL", 0)
    monkeypatch.setattr(fused_cross_entropy, "takes", lambda logits, target: fused_cross_entropy.is_in_rows(logits))


def problem(shape, dtype, spread=4.0):
    generator = torch.Generator().manual_seed(0)
    rows, classes = shape
    logits = (spread * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator)
    if rows > 1:
        target[1] = -100
    weight = torch.rand(classes, generator=generator) + 0.1
    return logits.to(DEVICE), target.to(DEVICE), weight.to(DEVICE)


def exact(logits, target, weight, reduction, grad):
    """Return loss and gradient in FP64."""
    wide = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(wide, target, None if weight is None else weight.double(), reduction=reduction)
    loss.backward(grad.double())
    return loss.detach(), wide.grad


def in_ulps(got, expected):
    """Return how far numbers are from exact ones, in units in the last place of their format."""
    info = torch.finfo(got.dtype)
    exponent = expected.abs().clamp(min=info.smallest_normal).log2().floor()
    return (got.double() - expected).abs() / (torch.exp2(exponent) * info.eps)


def check(logits, target, weight=None, reduction="mean", factor=3.0):
    """Compare loss and gradient with those of FP64."""
    leaf = logits.detach().requires_grad_()
    loss = cross_entropy_in_float32(F.cross_entropy, leaf, target, weight, reduction=reduction)
    assert type(loss.grad_fn).__name__ == ("ViewBackward0" if reduction == "none" else "FusedCrossEntropyBackward")
    grad = torch.full_like(loss, factor)
    loss.backward(grad)
    expected, expected_grad = exact(logits, target, weight, reduction, grad)
    assert loss.dtype == torch.float32
    # a loss near 0 is the logarithm of a number near 1
    assert ((loss.double() - expected).abs() <= 2.0**-21 * (1 + expected.abs()) * (1 + factor)).all()
    # rounded once, from a number whose error is some units of FP32; p - 1 has that of p
    near_target = (leaf.grad.double() - expected_grad).abs() <= 2.0**-20 * expected_grad.abs().amax(1, keepdim=True)
    assert ((in_ulps(leaf.grad, expected_grad) <= 0.51) | near_target).all()
    rounded = expected_grad.float().to(logits.dtype)
    assert (leaf.grad != rounded).float().mean() <= 0.002


@HALVES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_those_of_fp64(shape, dtype):
    logits, target, weight = problem(shape, dtype)
    check(logits, target)
    check(logits, target, weight, "sum")
    check(logits, target, weight, "mean")
    check(logits, target, None, "none")


@HALVES
def test_wherever_rows_begin(dtype):
    logits, target, weight = problem((4, 5003), dtype)
    wide = logits.new_full((4, 5003 + 13), float("nan"))
    for first in range(9):
        part = wide[:, first : first + 5003]
        part.copy_(logits)
        # what lies beside a row is neither read nor written
        kept = wide.clone()
        check(part, target, weight)
        assert torch.equal(wide.view(torch.int16), kept.view(torch.int16))
        wide.fill_(float("nan"))


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1e4])
def test_equal_and_far_logits(spread):
    for dtype in (torch.bfloat16, torch.float16):
        check(*problem((6, 600), dtype, spread)[:2])


def test_a_gradient_where_the_logits_are():
    logits, target, weight = problem((5, 5003), torch.bfloat16)
    _, count, kept = losses(logits, target, weight, -100, "mean")
    one = torch.ones((), device=DEVICE)
    other, here = torch.empty_like(logits), logits.clone()
    for out, given in ((other, logits), (here, here)):
        write_gradient(out, one, given, target, weight, -100, count, kept)
    assert torch.equal(other, here)
    assert not other[1].any()


def test_ignored_rows_are_not_read_and_a_target_that_is_no_class_shows():
    logits, target, _ = problem((5, 700), torch.bfloat16)
    logits[1] = float("nan")
    check(logits[[0, 2, 3, 4]].contiguous(), target[[0, 2, 3, 4]])
    leaf = logits.requires_grad_()
    loss = cross_entropy_in_float32(F.cross_entropy, leaf, target)
    loss.backward()
    assert loss.isfinite()
    assert not leaf.grad[1].any()
    for place in (700, -1):
        target[3] = place
        each = cross_entropy_in_float32(F.cross_entropy, logits, target, reduction="none")
        assert each.isnan().tolist() == [False, False, False, True, False]


def test_what_is_not_finite_shows():
    logits, target, _ = problem((6, 600), torch.float16)
    logits[0, 3], logits[2, 4], logits[3], logits[4, 0] = torch.inf, torch.nan, -torch.inf, -torch.inf
    each = cross_entropy_in_float32(F.cross_entropy, logits, target, reduction="none")
    assert each.isnan().tolist() == [True, False, True, True, False, False]
    assert torch.allclose(each[4:].double(), F.cross_entropy(logits[4:].double(), target[4:], reduction="none"))


@pytest.mark.parametrize("holds", [False, True])
def test_memory_is_written_over_only_where_nobody_else_can_reach_it(holds):
    logits, target, _ = problem((4, 600), torch.bfloat16)
    leaf, seen, held = logits.float().requires_grad_(), [], []

    def loss():
        narrow = leaf.bfloat16()
        narrow.register_hook(lambda grad: seen.append(grad.data_ptr()))
        seen.append(narrow.data_ptr())
        if holds:
            held.append(narrow)
        return cross_entropy_in_float32(F.cross_entropy, narrow, target)

    made = loss()
    # the interpreter holds memory in cycles
    gc.collect()
    made.backward()
    assert (seen[0] == seen[1]) is not holds
    assert (in_ulps(leaf.grad.bfloat16(), exact(logits, target, None, "mean", torch.ones(()))[1]) < 0.51).all()
    assert not holds or torch.equal(held[0], logits)


def test_kept_are_the_logits_themselves_and_eight_bytes_of_a_row():
    logits, target, _ = problem((4, 600), torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        cross_entropy_in_float32(F.cross_entropy, logits.requires_grad_(), target)
    others = [x for x in kept if x.data_ptr() != logits.data_ptr()]
    assert len(others) == len(kept) - 1
    assert sum(x.nbytes for x in others) == 4 * (8 + 8) + 4


def test_a_second_derivative_is_that_of_the_widened_loss():
    logits, target, _ = problem((3, 50), torch.bfloat16)
    x = logits.float().requires_grad_()
    results = []
    ours = partial(cross_entropy_in_float32, F.cross_entropy, target=target)
    for call in (ours, lambda y: F.cross_entropy(y.float(), target)):
        (first,) = torch.autograd.grad(call(x.bfloat16()).square(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert results[0].any()
    torch.testing.assert_close(*results, rtol=0.01, atol=1e-4)
