"""Gradients that torch's CPU kernels would sum in 16 bits: here the sums are those of FP32, rounded once."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import duotone.torch as dt
from duotone.torch.op_rules import Region
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
    result.float().sum().backward()
    return [leaf.grad for leaf in leaves if leaf.is_floating_point()]


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
    assert grads[2].float().tolist() == pytest.approx([ROWS] * 8, rel=4e-3)


@HALVES
def test_bags_of_embeddings(dtype):
    tokens, offsets = torch.zeros(ROWS, dtype=torch.int64), torch.arange(0, ROWS, 10)
    (grad,) = gradients(F.embedding_bag, [tokens, torch.ones(1, 2, dtype=dtype), offsets], Region(dtype), mode="sum")
    assert torch.equal(grad, torch.full((1, 2), ROWS).to(dtype))


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
def test_where_no_weight_has_a_gradient_the_kernel_stays(dtype):
    seen = []

    def norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None = None) -> Tensor:
        seen.append(x.dtype)
        return F.layer_norm(x, shape, weight)

    sum_in_float32(norm, (torch.ones(2, 4, dtype=dtype), (4,)), {})
    sum_in_float32(norm, (torch.ones(2, 4, dtype=dtype), (4,)), {"weight": torch.ones(4, dtype=dtype)})
    assert seen == [dtype, torch.float32]


def test_norms_that_keep_statistics_sum_in_float32_by_themselves():
    torch.manual_seed(0)
    x = torch.randn(ROWS, 4)
    model = dt.cast(torch.nn.BatchNorm1d(4), "bf16")
    model(x).sum().backward()
    assert model.bias.grad.tolist() == [ROWS] * 4
