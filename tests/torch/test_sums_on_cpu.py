"""Gradients that torch's CPU kernels would sum in 16 bits: here the sums are those of FP32, rounded once."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import duotone.torch as dt
from duotone.torch.region import Region
from duotone.torch.sums_on_cpu import sum_in_float32

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
ROWS = 3000


def gradients(func, operands: list[Tensor], region: Region | None, **options) -> list[Tensor]:
    """Return the gradients of the sum of `func`'s result for each floating-point operand."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in operands]
    if region is None:
        result = func(*leaves, **options)
    else:
        with region.on("cpu"):
            result = func(*leaves, **options)
    result.to(torch.promote_types(result.dtype, torch.float32)).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.is_floating_point()]


def assert_rounded(grad: Tensor, exact: Tensor) -> None:
    """Assert that each element is its FP64 value rounded once, but for what an FP32 sum of `ROWS` terms may lose."""
    half_an_ulp = torch.finfo(grad.dtype).eps / 2
    torch.testing.assert_close(grad.double(), exact, rtol=1.02 * half_an_ulp, atol=1e-3)


@HALVES
def test_a_row_that_many_tokens_use(dtype):
    tokens, weight = torch.zeros(ROWS, dtype=torch.int64), torch.ones(2, 3, dtype=dtype)
    (grad,) = gradients(F.embedding, [tokens, weight], Region(dtype))
    # 3000 is between two BF16 numbers, 2992 and 3008
    assert torch.equal(grad, torch.tensor([[ROWS] * 3, [0] * 3]).to(dtype))
    # what it is for: without it the sum ends far below
    (plain,) = gradients(F.embedding, [tokens, weight], None)
    assert plain[0, 0] < 0.8 * ROWS


@HALVES
def test_the_weight_and_bias_of_a_layer_norm(dtype, same_bits):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(ROWS, 8).to(dtype), torch.ones(8).to(dtype), torch.zeros(8).to(dtype)
    call = {"normalized_shape": (8,)}

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight=weight, bias=bias, **call)

    grads = gradients(norm, [x, weight, bias], Region(dtype))
    whole = gradients(norm, [x.float(), weight.float(), bias.float()], None)
    assert all(same_bits(grad, want.to(dtype)) for grad, want in zip(grads, whole, strict=True))
    exact = gradients(norm, [x.double(), weight.double(), bias.double()], None)
    for grad, want in zip(grads[1:], exact[1:], strict=True):
        assert_rounded(grad, want)


BAGS = torch.arange(0, ROWS, 10)
GATHERS = {
    "embedding": (F.embedding, (), {}),
    "embedding with padding": (F.embedding, (), {"padding_idx": 1}),
    "bags of sums": (F.embedding_bag, (BAGS, None, 2.0, False, "sum"), {}),
    "bags of means with padding": (F.embedding_bag, (), {"offsets": BAGS, "mode": "mean", "padding_idx": 1}),
    "bags of largest": (F.embedding_bag, (BAGS,), {"mode": "max"}),
}


@HALVES
@pytest.mark.parametrize("name", GATHERS)
@pytest.mark.parametrize("around", [nullcontext(), torch.autocast("cpu", torch.bfloat16)], ids=["alone", "autocast"])
def test_gradients_of_rows_are_those_of_float64_rounded(dtype, name, around):
    torch.manual_seed(0)
    func, rest, options = GATHERS[name]
    tokens, weight = torch.randint(0, 3, (ROWS,)), torch.randn(4, 2).to(dtype).requires_grad_()
    exact = weight.detach().double().requires_grad_()
    with around:
        got = sum_in_float32(func, (tokens, weight, *rest), options)
    # of one sign, so that no sum cancels, and exact in 16 bits
    direction = (torch.rand(got.shape) + 0.5).to(dtype)
    (grad,) = torch.autograd.grad(got, weight, direction)
    (expected,) = torch.autograd.grad(func(tokens, exact, *rest, **options), exact, direction.double())
    assert grad.dtype == got.dtype == dtype
    assert_rounded(grad, expected)
    # the last row is in no bag, and a padding row has no gradient
    assert (grad[:3] == 0).all(dim=1).tolist() == [False, options.get("padding_idx") == 1, False]
    assert (grad[3] == 0).all()


@HALVES
def test_results_are_those_of_float32_rounded_once(dtype, same_bits):
    torch.manual_seed(1)
    x, weight = torch.randn(5, 16).to(dtype), torch.randn(16).to(dtype)
    got = sum_in_float32(F.layer_norm, (x, (16,)), {"weight": weight})
    assert same_bits(got, F.layer_norm(x.float(), (16,), weight=weight.float()).to(dtype))
    # the narrowest operand decides
    assert sum_in_float32(F.layer_norm, (x.float(), (16,)), {"weight": weight}).dtype == dtype
    assert sum_in_float32(F.layer_norm, (x.float(), (16,)), {"weight": weight.float()}).dtype == torch.float32
    padded = sum_in_float32(F.embedding, (torch.tensor([0, 1]), x), {"padding_idx": 1})
    assert same_bits(padded, x[:2])


@HALVES
def test_where_no_weight_has_a_gradient_the_kernel_stays(dtype, monkeypatch):
    seen, kernel = [], torch.layer_norm

    def spy(x: Tensor, *rest) -> Tensor:
        seen.append(x.dtype)
        return kernel(x, *rest)

    monkeypatch.setattr(torch, "layer_norm", spy)
    x = torch.ones(2, 4, dtype=dtype)
    for options in ({}, {"weight": x[0]}):
        sum_in_float32(F.layer_norm, (x, (4,)), options)
    assert seen == [dtype, torch.float32]


def test_norms_that_keep_statistics_sum_in_float32_by_themselves():
    torch.manual_seed(0)
    x = torch.randn(ROWS, 4)
    model = dt.cast(torch.nn.BatchNorm1d(4), "bf16")
    model(x).sum().backward()
    assert model.bias.grad.tolist() == [ROWS] * 4


@HALVES
def test_a_sparse_gradient_stays_sparse(dtype):
    model = dt.cast(torch.nn.Embedding(4, 2, sparse=True), "bf16" if dtype == torch.bfloat16 else "fp16")
    model(torch.tensor([1, 1])).sum().backward()
    assert model.weight.grad.is_sparse


@HALVES
def test_max_norm_still_writes_into_the_weight(dtype):
    model = torch.nn.Embedding(4, 2, max_norm=1.0)
    torch.nn.init.constant_(model.weight, 3.0)
    dt.cast(model, "bf16" if dtype == torch.bfloat16 else "fp16")
    rows = model(torch.tensor([1]))
    assert rows.norm().item() == pytest.approx(1.0, rel=0.01)
    assert model.weight[1].norm().item() == pytest.approx(1.0, rel=0.01)
    assert model.weight[0].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("func", "between"), [(F.embedding, (2.0, False)), (F.embedding_bag, (2.0, False, "sum"))], ids=["rows", "bags"]
)
def test_arguments_by_position_are_read_too(func, between):
    # torch.compile hands them over as a module gives them
    tokens, third = torch.tensor([1, 1]), None if func is F.embedding else torch.tensor([0])
    weight = torch.full((4, 2), 3.0, dtype=torch.bfloat16)
    sum_in_float32(func, (tokens, weight, third, 1.0), {})
    assert weight[1].norm().item() == pytest.approx(1.0, rel=0.01)
    weight.requires_grad_()
    sum_in_float32(func, (tokens, weight, third, None, *between, True), {}).sum().backward()
    assert weight.grad.is_sparse
