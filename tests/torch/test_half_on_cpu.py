"""FP16 products in FP32 arithmetic: one rounding of the operands and one of the result, forward and backward."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import duotone.torch as dt
from duotone.errors import DuotoneWarning
from duotone.torch import half_on_cpu, op_rules
from duotone.torch.half_on_cpu import PRODUCTS, multiply_in_float32, say_once_how_half_runs_on_cpu


@pytest.fixture(autouse=True)
def _cpu_without_half_products(monkeypatch):
    monkeypatch.setattr(op_rules, "cpu_has_half_products", lambda: False)


def half(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(shape).half().requires_grad_(requires_grad)


CALLS = {
    "linear": (F.linear, (half(4, 5), half(3, 5), half(3))),
    "matmul": (torch.matmul, (half(2, 4, 5), half(5, 3))),
    "@": (Tensor.matmul, (half(4, 5), half(5, 3))),
    "mm": (torch.mm, (half(4, 5), half(5, 3))),
    "bmm": (torch.bmm, (half(2, 4, 5), half(2, 5, 3))),
    "mv": (torch.mv, (half(4, 5), half(5))),
    "addmm": (torch.addmm, (half(4, 3), half(4, 5), half(5, 3))),
    "baddbmm": (torch.baddbmm, (half(2, 4, 3), half(2, 4, 5), half(2, 5, 3))),
    "bilinear": (F.bilinear, (half(4, 5), half(4, 6), half(3, 5, 6))),
    "conv1d": (F.conv1d, (half(2, 3, 8), half(4, 3, 3), half(4))),
    "conv2d": (F.conv2d, (half(2, 3, 8, 8), half(4, 3, 3, 3), half(4))),
    "conv3d": (F.conv3d, (half(1, 2, 4, 4, 4), half(3, 2, 2, 2, 2))),
    "conv_transpose2d": (F.conv_transpose2d, (half(2, 3, 4, 4), half(3, 2, 3, 3))),
    "attention": (F.scaled_dot_product_attention, (half(1, 2, 6, 4), half(1, 2, 6, 4), half(1, 2, 6, 4))),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_product_is_that_of_float32_rounded_once(name, same_bits):
    func, operands = CALLS[name]
    assert func in PRODUCTS
    widened = [operand.detach().float().requires_grad_() for operand in operands]
    got, expected = multiply_in_float32(func, operands, {}), func(*widened).half()
    assert same_bits(got, expected)

    direction = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, operands, direction)
    for got_grad, want in zip(got_grads, torch.autograd.grad(expected, widened, direction), strict=True):
        assert same_bits(got_grad, want.half())


SPELLINGS = {
    "a @ b": lambda a, b: a @ b,
    "a.matmul(b)": lambda a, b: a.matmul(b),
    "torch.matmul": torch.matmul,
    "a.mm(b)": lambda a, b: a.mm(b),
    "torch.mm": torch.mm,
    "einsum": lambda a, b: torch.einsum("ij,jk->ik", a, b),
    "einsum of a list": lambda a, b: torch.einsum("ij,jk->ik", [a, b]),
    "F.linear": lambda a, b: F.linear(a, b.T),
    "a.addmm": lambda a, b: torch.zeros_like(a).addmm(a, b),
    "FP32 rounded first": lambda a, b: torch.matmul(a.float() * (1 + 2.0**-13), b),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_region_takes_every_spelling_of_a_product(name, monkeypatch, same_bits):
    taken = []

    def spy(func, args, kwargs):
        taken.append(func)
        return multiply_in_float32(func, args, kwargs)

    monkeypatch.setattr(op_rules, "multiply_in_float32", spy)
    a, b = half(64, 64), half(64, 64)
    with op_rules.Region(torch.float16).on("cpu"):
        product = SPELLINGS[name](a, b)
    assert taken
    assert same_bits(product, (a.float() @ b.float()).half())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_other_products_are_left_alone(dtype):
    a = torch.full((2, 2), 3).to(dtype)
    with op_rules.Region(torch.float16).on("cpu"):
        product = a @ a
    assert product.dtype == dtype
    assert (product == 18).all()


def test_sums_longer_than_float16_counts():
    ones = torch.ones(1, 5000, dtype=torch.float16)
    # in FP16 a running sum of ones ends at 2048; the nearest FP16 number to 5000 is itself
    assert multiply_in_float32(torch.matmul, (ones, ones.T), {}).item() == 5000.0
    assert multiply_in_float32(torch.matmul, (ones * 100, ones.T * 100), {}).item() == float("inf")


def test_a_model_in_fp16_learns_with_float16_gradients():
    torch.manual_seed(0)
    model = dt.cast(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1)), "fp16")
    plain = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    plain.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    x = torch.randn(32, 8).half().float()
    model(x).mean().backward()
    plain(x).mean().backward()
    for param, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert param.grad.dtype == torch.float16
        assert torch.allclose(param.grad.float(), reference.grad, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("has_products", [True, False])
def test_what_it_does_is_said_once(monkeypatch, has_products):
    monkeypatch.setattr(half_on_cpu, "cpu_has_half_products", lambda: has_products)
    say_once_how_half_runs_on_cpu.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            dt.cast(nn.Linear(1, 1), "fp16")
            dt.cast(nn.Linear(1, 1), "bf16")
    about_it = [each for each in said if "this CPU has no FP16 matrix products" in str(each.message)]
    assert len(about_it) == (0 if has_products else 1)
    # it points at the call of cast
    assert all((each.category, each.filename) == (DuotoneWarning, __file__) for each in about_it)
