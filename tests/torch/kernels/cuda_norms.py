"""Norms' kernels against FP64, on a GPU or in Triton's interpreter; `test_cuda.py` runs this."""

import pytest
import torch
from torch.nn import functional as F

from duotone.torch.casting.float32_inside import fused_norms
from duotone.torch.casting.float32_inside.norms import layer_norm_in_float32, rms_norm_in_float32

pytest.importorskip("triton", reason="the cuda backend needs Triton")
from duotone.torch.kernels.cuda import norms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16]
# of the data, and of what is normalized over
SHAPES = [((5, 7), 1), ((2, 3, 64), 1), ((4, 768), 1), ((3, 5000), 1), ((3, 4, 6), 2), ((1, 1), 1)]


@pytest.fixture(autouse=True)
def through_the_kernels(monkeypatch):
    """Have norms go through the kernels, on a CPU too, where they are interpreted."""
    monkeypatch.setattr(fused_norms, "takes", fused_norms.fits)


def problem(shape, rank, dtype, parts=(True, True)):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3 + 1).to(dtype)
    over = shape[-rank:]
    weights = [torch.randn(over, generator=generator) if part else None for part in parts]
    grad = torch.randn(shape, generator=generator).to(dtype)
    return [each if each is None else each.to(DEVICE) for each in (x, *weights, grad)]


def call(kind, x, weight, bias, rank, eps):
    shape = x.shape[-rank:]
    if kind == "rms_norm":
        return rms_norm_in_float32(F.rms_norm, x, shape, weight, eps)
    return layer_norm_in_float32(F.layer_norm, x, shape, weight, bias, eps)


def exact(kind, x, weight, bias, rank, eps):
    shape = x.shape[-rank:]
    return F.rms_norm(x, shape, weight, eps) if kind == "rms_norm" else F.layer_norm(x, shape, weight, bias, eps)


def close(got, expected):
    """Return whether numbers are exact ones, rounded once but for an error of some units of FP32 before."""
    info = torch.finfo(got.dtype)
    exponent = expected.abs().clamp(min=info.smallest_normal).log2().floor()
    ulp = torch.exp2(exponent) * info.eps
    return ((got.double() - expected).abs() <= 0.51 * ulp + 2.0**-20 * (1 + expected.abs().max())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(("shape", "rank"), SHAPES, ids=str)
def test_results_and_gradients_are_those_of_fp64(shape, rank, kind, dtype):
    for parts in [(True, False)] if kind == "rms_norm" else [(True, True), (True, False), (False, True)]:
        *operands, grad = problem(shape, rank, dtype, parts)
        leaves = [None if each is None else each.requires_grad_() for each in operands]
        wide = [None if each is None else each.detach().double().requires_grad_() for each in operands]
        y, expected = call(kind, *leaves, rank, 1e-5), exact(kind, *wide, rank, 1e-5)
        assert type(y.grad_fn).__name__ == "FusedNormBackward"
        assert close(y, expected.detach())
        y.backward(grad)
        expected.backward(grad.double())
        for leaf, other in zip(leaves, wide, strict=True):
            if leaf is not None:
                assert leaf.grad.dtype == leaf.dtype
                assert (
                    close(leaf.grad, other.grad)
                    if leaf is leaves[0]
                    else torch.allclose(leaf.grad.double(), other.grad, rtol=1e-5, atol=1e-4)
                )


def test_weights_are_not_rounded_and_statistics_are_float32():
    # a weight between two BF16 numbers, a mean that 16 bits do not hold
    x = (1024 + 16 * torch.arange(24.0).remainder(5)).bfloat16().view(2, 12).to(DEVICE)
    weight = torch.full((12,), 1 + 2.0**-9, device=DEVICE)
    y = call("layer_norm", x, weight, None, 1, 1e-5)
    assert close(y, F.layer_norm(x.double(), (12,), weight.double()))
    assert not torch.equal(y, F.layer_norm(x.double(), (12,), weight.bfloat16().double()).bfloat16())


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_many_rows_are_shared_by_programs_and_only_what_is_wanted_is_computed(kind, monkeypatch):
    monkeypatch.setattr(norms, "_PROGRAMS", 3)
    *operands, grad = problem((20, 33), 1, torch.bfloat16, (True, kind == "layer_norm"))
    for wanted in ([0], [1], [0, 1]):
        leaves = [each if each is None else each.detach().clone() for each in operands]
        for place in wanted:
            leaves[place].requires_grad_()
        wide = [each if each is None else each.detach().double() for each in leaves]
        for place in wanted:
            wide[place].requires_grad_()
        got = torch.autograd.grad(call(kind, *leaves, 1, 1e-5), [leaves[place] for place in wanted], grad)
        expected = torch.autograd.grad(exact(kind, *wide, 1, 1e-5), [wide[place] for place in wanted], grad.double())
        for one, other in zip(got, expected, strict=True):
            assert close(one, other)


def test_what_is_kept_and_what_is_not_finite():
    x, weight, bias, _ = problem((4, 64), 1, torch.float16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call("layer_norm", x.requires_grad_(), weight, bias, 1, 1e-5)
    assert sorted(each.nbytes for each in kept) == [32, 256, 256, x.nbytes]
    with torch.no_grad():
        x[1, 3], x[2, 5] = torch.inf, torch.nan
        assert call("layer_norm", x, weight, bias, 1, 1e-5).isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_second_derivatives(kind):
    *operands, _ = problem((3, 10), 1, torch.bfloat16, (True, kind == "layer_norm"))
    results = []
    for function in (call, lambda kind, x, *rest: exact(kind, x.float(), *rest).bfloat16()):
        x = operands[0].float().requires_grad_()
        (first,) = torch.autograd.grad(
            function(kind, x.bfloat16(), *operands[1:], 1, 1e-5).float().pow(3).sum(), x, create_graph=True
        )
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert results[0].any()
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


def test_what_stays_with_torch():
    x, weight, bias, _ = problem((4, 64), 1, torch.bfloat16)
    assert fused_norms.fits(x, (64,), weight, bias)
    for given in (
        (x.float(), (64,), weight),
        (x, (64,), weight.bfloat16()),
        (x, (32,), weight),
        (x[:0], (64,), weight),
        (x, (64,), None, None),
    ):
        assert not fused_norms.fits(*given)
    assert not fused_norms.fits(x.new_zeros(1, 8200), (8200,), weight.new_ones(8200))
    assert fused_norms._MOST_WIDTH == norms.MOST_WIDTH
    with torch.autograd.forward_ad.dual_level():
        assert not fused_norms.fits(x, (64,), weight)
