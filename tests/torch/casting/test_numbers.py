"""Numbers that 16 bits do not have, wherever code writes them: against the same code in FP32, and as kernels."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import duotone.torch as dt
from duotone.torch.casting import numbers
from duotone.torch.casting.region import Region

from .op_by_hand import NARROW, bits

aten = torch.ops.aten
HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
LOWEST = torch.finfo(torch.float32).min

pytestmark = pytest.mark.filterwarnings("ignore")


@HALVES
@given(number=st.one_of(st.floats(), st.integers(), st.sampled_from([1e-8, -1e9, LOWEST, 10**400, 2.0**-25, 65519.9])))
def test_a_number_that_is_held_is_neither_inf_nor_zero_unless_it_was(dtype, number):
    held = numbers.held(number, dtype)
    stored = torch.tensor(held, dtype=torch.float64).to(dtype).item()
    if number in (0, math.inf, -math.inf) or (isinstance(number, float) and math.isnan(number)):
        assert held is number
        return
    assert math.isfinite(stored)
    assert (stored > 0, stored < 0) == (number > 0, number < 0)
    finfo = torch.finfo(dtype)
    smallest = finfo.smallest_normal * finfo.eps
    if smallest <= abs(number) <= finfo.max:
        assert held is number
    else:
        assert abs(held) in (smallest, finfo.max)


@HALVES
@given(number=st.floats(-2, 2))
def test_a_bound_stays_on_its_side_of_one(dtype, number):
    stored = torch.tensor(numbers.bound(number, dtype), dtype=torch.float64).to(dtype).item()
    assert (abs(stored) < 1) == (abs(number) < 1) or abs(number) > 1
    assert (stored == 0) == (number == 0)


def assigned(x: Tensor, where: object, value: object) -> Tensor:
    x = x.clone()
    x[where] = value
    return x


ROW, PLACE = torch.tensor([0]), torch.tensor([[0]])
# what is stored: -1e9 or FP32's lowest in one place at least, with torch.nan_to_num for Inf
STORES = {
    "masked_fill": lambda x, n: x.masked_fill(x < 0, n),
    "masked_fill, 0-d": lambda x, n: x.masked_fill(x < 0, torch.tensor(n)),
    "masked_fill_": lambda x, n: x.clone().masked_fill_(x < 0, n),
    "where": lambda x, n: torch.where(x < 0, n, x),
    "Tensor.where": lambda x, n: x.where(x > 0, n),
    "where, 0-d": lambda x, n: torch.where(x > 0, x, torch.tensor(n)),
    "x[i] =": lambda x, n: assigned(x, 0, n),
    "x[mask] =": lambda x, n: assigned(x, x < 0, n),
    "x[mask] =, 0-d": lambda x, n: assigned(x, x < 0, torch.tensor(n)),
    "x[i] =, FP32": lambda x, n: assigned(x, 0, torch.full((4,), n)),
    "index_put_": lambda x, n: x.clone().index_put_((ROW,), torch.tensor(n)),
    "index_fill": lambda x, n: x.index_fill(0, ROW, n),
    "index_fill_": lambda x, n: x.clone().index_fill_(0, ROW, n),
    "scatter": lambda x, n: x.scatter(0, PLACE, n),
    "scatter, value=": lambda x, n: x.scatter(0, PLACE, value=n),
    "scatter_": lambda x, n: x.clone().scatter_(0, PLACE, n),
    "scatter_, FP32": lambda x, n: x.clone().scatter_(0, PLACE, torch.full((1, 1), n)),
    "fill": torch.fill,
    "fill_": lambda x, n: x.clone().fill_(n),
    "fill_diagonal_": lambda x, n: x.clone().fill_diagonal_(n),
    "full": lambda x, n: torch.full((2,), n, dtype=x.dtype),
    "full_like": torch.full_like,
    "new_full": lambda x, n: x.new_full((2,), n),
    "tensor": lambda x, n: torch.tensor(n, dtype=x.dtype),
    "new_tensor": lambda x, n: x.new_tensor(n),
    "copy_": lambda x, n: x.clone().copy_(torch.full((4,), n)),
    "to": lambda x, n: torch.full((4,), n).to(x.dtype),
    "to a tensor": lambda x, n: torch.full((4,), n).to(x),
    "type": lambda x, n: torch.full((4,), n).type(x.dtype),
    "type_as": lambda x, n: torch.full((4,), n).type_as(x),
    "clamp": lambda x, n: x.masked_fill(x < 0, -torch.inf).clamp(min=n),
    "clamp_": lambda x, n: x.masked_fill(x < 0, -torch.inf).clamp_(min=n),
    "hardtanh": lambda x, n: F.hardtanh(x.masked_fill(x < 0, -torch.inf), n, -n),
    "threshold": lambda x, n: F.threshold(x, 0.0, n),
    "nan_to_num": lambda x, n: x.masked_fill(x < 0, -torch.inf).nan_to_num(neginf=n),
    "pad": lambda x, n: F.pad(x, (1, 1), value=n),
    "constant_pad_nd": lambda x, n: torch.constant_pad_nd(x, (1, 1), n),
    "pad_sequence": lambda x, n: nn.utils.rnn.pad_sequence([x[0], x[1, :2]], padding_value=n),
    "pad_packed_sequence": lambda x, n: nn.utils.rnn.pad_packed_sequence(
        nn.utils.rnn.pack_padded_sequence(x[:, :, None], [2, 1], batch_first=True), padding_value=n, total_length=3
    )[0],
    "add_": lambda x, n: (x * 0).add_(n),
    "+= mask": lambda x, n: x.clone().add_(torch.full((4,), n)),
}


@HALVES
@pytest.mark.parametrize("number", [-1e9, LOWEST])
@pytest.mark.parametrize("name", STORES)
def test_what_is_stored_in_16_bits_is_finite(name, number, dtype):
    x = torch.tensor([[-1.0, 2, -3, 4], [5, -6, 7, 8]])
    exact = STORES[name](x, number)
    with Region(dtype).on("cpu"):
        got = STORES[name](x.to(dtype), number)
    limit = torch.finfo(dtype).max
    assert got.dtype == dtype
    assert bits(got) == bits(exact.clamp(-limit, limit).to(dtype)), name


# what is no store of Inf, and what torch refuses without a region
NOT_INF = ("clamp", "clamp_", "hardtanh", "nan_to_num", "index_put_", "scatter_, FP32")


@HALVES
@pytest.mark.parametrize("name", [name for name in STORES if name not in NOT_INF])
def test_inf_stays_inf(name, dtype):
    x = torch.tensor([[-1.0, 2, -3, 4], [5, -6, 7, 8]]).to(dtype)
    expected = STORES[name](x, -torch.inf)
    with Region(dtype).on("cpu"):
        assert bits(STORES[name](x, -torch.inf)) == bits(expected)


# numbers beside a tensor: the result is FP32's of the widened tensor
WIDENED = {
    "x + 1e-8": lambda x: x + 1e-8,
    "1e-8 + x": lambda x: 1e-8 + x,
    "x - 1e-8": lambda x: x - 1e-8,
    "1e9 - x": lambda x: 1e9 - x,
    "(1 - x) * -1e9": lambda x: (1 - x) * -1e9,
    "1e-9 * x": lambda x: 1e-9 * x,
    "x / 1e9": lambda x: x / 1e9,
    "add": lambda x: torch.add(x, 1e-8),
    "add, other=": lambda x: torch.add(input=x, other=1e-8),
    "subtract": lambda x: torch.subtract(x, 1e-8),
    "rsub": lambda x: torch.rsub(x, 1e9),
    "mul": lambda x: x.mul(1e9),
    "true_divide": lambda x: torch.true_divide(x, 1e9),
    "clamp": lambda x: x.clamp(min=1e-8),
    "clip": lambda x: torch.clip(x, 1e-8, 1 - 1e-8),
    "clamp_min": lambda x: x.clamp_min(1e-12),
    "clamp_max": lambda x: x.clamp_max(1 - 1e-4),
}


@pytest.mark.parametrize("name", WIDENED)
def test_a_number_beside_fp16_that_it_does_not_have_gives_fp32(name):
    x = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float16)
    with Region(torch.float16).on("cpu"):
        got = WIDENED[name](x)
    assert bits(got) == bits(WIDENED[name](x.float()))
    x.requires_grad_()
    with Region(torch.float16).on("cpu"):
        WIDENED[name](x).sum().backward()
    wide = x.detach().float().requires_grad_()
    WIDENED[name](wide).sum().backward()
    assert bits(x.grad) == bits(wide.grad.half())


@HALVES
def test_numbers_that_16_bits_have_change_nothing(dtype):
    x = torch.linspace(-2, 2, 9, dtype=dtype)
    calls = [
        lambda: x + 0.1,
        lambda: 2 - x,
        lambda: -3 * x,
        lambda: x / 7,
        lambda: x * 0,
        lambda: x + torch.inf,
        lambda: x * True,
        lambda: x.clamp(-1, 1),
        lambda: x.clamp(min=0),
        lambda: x.clamp(min=x, max=x + 1),
        lambda: torch.add(x, x, alpha=1e-8),
        lambda: torch.add(x, 1e-8, out=torch.empty_like(x)),
        lambda: torch.div(x, 3, rounding_mode="floor"),
    ]
    for at, call in enumerate(calls):
        expected = call()
        with Region(dtype).on("cpu"):
            assert bits(call()) == bits(expected), at


def test_bounds_in_place_stay_on_their_side():
    x = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float16)
    with Region(torch.float16).on("cpu"):
        x.clamp_(1e-8, 1 - 1e-8)
        assert torch.empty(1, dtype=torch.float16).fill_(0).add_(1e-8).item() == 2**-24
    assert x.tolist() == [2**-24, 0.5, 1 - 2**-11]


def test_what_a_gradient_goes_through_overflows_as_always():
    x = torch.full((2,), 1e9, requires_grad=True)
    with Region(torch.float16).on("cpu"):
        assert x.half().isinf().all()
        assert torch.zeros(2, dtype=torch.float16).add_(x).isinf().all()
        assert assigned(torch.zeros(2, dtype=torch.float16), slice(2), x).isinf().all()
        # and so does what the model computes
        assert (torch.full((2,), 6e4, dtype=torch.float16) * 2).isinf().all()


def test_places_are_no_numbers():
    x = torch.zeros(70_000, dtype=torch.float16)
    with Region(torch.float16).on("cpu"):
        x[69_999] = 1.0
        assert x.new_full((70_000,), 1.0).shape == (70_000,)
        assert F.pad(x, (0, 70_000)).shape == (140_000,)
    assert x[69_999] == 1


@pytest.mark.parametrize("policy", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["where", "x[mask] =", "to", "(1 - x) * -1e9", "add_"])
def test_rows_that_are_masked_as_a_whole_are_finite(name, policy):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            scores = self.q(x) @ self.k(x).mT
            mask = keep[:, None].expand_as(scores)
            additive = (1 - mask.to(torch.float32)) * LOWEST
            masked = {
                "where": lambda: torch.where(mask, scores, LOWEST),
                "x[mask] =": lambda: assigned(scores, ~mask, LOWEST),
                "to": lambda: scores + additive.to(scores.dtype) / 2,
                "(1 - x) * -1e9": lambda: scores + (1 - mask.to(scores.dtype)) * -1e9,
                "add_": lambda: scores.add_(additive),
            }[name]()
            return masked.softmax(-1) @ self.v(x)

    keep = torch.tensor([[True, True, False], [False] * 3])
    x = torch.randn(2, 3, 8)
    torch.manual_seed(0)
    model = Attention()
    expected = model(x, keep)[0]
    got = dt.cast(model, policy)(x, keep)
    assert got.isfinite().all()
    torch.testing.assert_close(got[0], expected, atol=2e-2, rtol=2e-2)
    got.sum().backward()
    assert all(param.grad.isfinite().all() for param in model.parameters())


GUARDS = {
    "log(softmax + 1e-8)": lambda z: -(z.softmax(-1) * torch.log(z.softmax(-1) + 1e-8)).sum(-1).mean(),
    "log(softmax.clamp(1e-8))": lambda z: -(z.softmax(-1) * z.softmax(-1).clamp(min=1e-8).log()).sum(-1).mean(),
    "exp(l) * l": lambda z: -(F.log_softmax(z * 400, -1).exp() * F.log_softmax(z * 400, -1)).sum(-1).mean(),
    "log(1 - p)": lambda z: -(1 - z.sigmoid().clamp(max=1 - 1e-6)).log().clamp(max=20).mean(),
    "x / (|x| + 1e-8)": lambda z: (z * 0 / ((z * 0).abs().amax(-1, keepdim=True) + 1e-8)).mean(),
}


@pytest.mark.parametrize("policy", ["fp16", "bf16"])
@pytest.mark.parametrize("name", GUARDS)
def test_guards_against_zero_hold(name, policy):
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    x = torch.randn(16, 8) * 60

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = model

        def forward(self, x: Tensor) -> Tensor:
            return GUARDS[name](self.linear(x))

    exact = GUARDS[name](model(x))
    loss = dt.cast(Loss(), policy)(x)
    torch.testing.assert_close(loss, exact, atol=1e-2, rtol=0.2)
    loss.backward()
    if name != "x / (|x| + 1e-8)":
        # whose gradient is 1e8, beyond FP16
        assert model.weight.grad.isfinite().all()


def test_a_probability_that_fp16_has_as_0_does_not_spoil_the_gradient():
    logits = torch.tensor([[0.0, 40.0]], dtype=torch.float16, requires_grad=True)
    with Region(torch.float16).on("cpu"):
        (-torch.log(logits.softmax(-1) + 1e-8)[0, 0] * 1024).backward()
    assert logits.grad.tolist() == [[0, 0]]
    # what is no 0 overflows, so that the scale is lowered
    with Region(torch.float16).on("cpu"):
        x = torch.tensor([0.0, 0.001], dtype=torch.float16, requires_grad=True)
        (torch.log(x + 1e-8) * 1024).sum().backward()
    assert x.grad.tolist() == [65504, torch.inf]


def test_log_probabilities_are_fp32_as_of_the_widened_logits():
    logits = torch.randn(4, 100, dtype=torch.bfloat16)
    with Region(torch.bfloat16).on("cpu"):
        for got in (F.log_softmax(logits, -1), logits.log_softmax(-1), torch.log_softmax(logits, -1, dtype=None)):
            assert bits(got) == bits(F.log_softmax(logits.float(), -1))
        assert F.log_softmax(logits, -1, dtype=torch.bfloat16).dtype == torch.bfloat16


# each function on plain tensors, called with the kernel in place of torch's function
AS_KERNELS = {
    "add.Scalar": (numbers.widen_beside_number, aten.add.Scalar, torch.add, (1e-8,), {}),
    "mul.Scalar": (numbers.widen_beside_number, aten.mul.Scalar, torch.mul, (1e9,), {}),
    "clamp": (numbers.clamp, aten.clamp.default, torch.clamp, (1e-8, 1 - 1e-8), {}),
    "clamp beyond": (numbers.clamp, aten.clamp.default, torch.clamp, (-1e9,), {}),
    "clamp_": (numbers.clamp_in_place, aten.clamp_.default, Tensor.clamp_, (1e-8,), {}),
    "masked_fill.Scalar": (
        numbers.store_numbers,
        aten.masked_fill.Scalar,
        torch.masked_fill,
        (torch.tensor([True, False]), -1e9),
        {},
    ),
    "fill_.Scalar": (numbers.store_numbers, aten.fill_.Scalar, Tensor.fill_, (-1e9,), {}),
    "full_like": (numbers.store_numbers, aten.full_like.default, torch.full_like, (-1e9,), {}),
    "constant_pad_nd": (numbers.store_numbers, aten.constant_pad_nd.default, F.pad, ((1, 1),), {"value": -1e9}),
    "index_fill.int_Scalar": (
        numbers.store_numbers,
        aten.index_fill.int_Scalar,
        torch.index_fill,
        (0, torch.tensor([1]), -1e9),
        {},
    ),
    "scatter_.value": (
        numbers.store_value,
        aten.scatter_.value,
        Tensor.scatter_,
        (0, torch.tensor([1]), -1e9),
        {},
    ),
    "index_put_": (
        numbers.store,
        aten.index_put_.default,
        Tensor.index_put_,
        ((torch.tensor([1]),), torch.tensor(-1e9)),
        {},
    ),
    "copy_": (numbers.copy_in_place, aten.copy_.default, Tensor.copy_, (torch.tensor([-1e9, 1.0]),), {}),
    "add_.Tensor": (numbers.add_in_place, aten.add_.Tensor, Tensor.add_, (torch.tensor([-1e9, 1.0]),), {}),
}


@pytest.mark.parametrize("name", AS_KERNELS)
def test_the_kernel_is_carried_out_as_the_function_is(name):
    replacement, kernel, function, args, kwargs = AS_KERNELS[name]
    x = torch.tensor([0.0, 1.0], dtype=torch.float16)
    with Region(torch.float16).on("cpu"):
        expected = function(x.clone(), *args, **kwargs)
    as_kernel = (*args, *kwargs.values()) if name == "constant_pad_nd" else args
    got = replacement(kernel, (x.clone(), *as_kernel), {} if name == "constant_pad_nd" else kwargs)
    assert expected.isfinite().all()
    assert bits(got) == bits(expected)


def test_where_and_casts_as_kernels():
    x, mask = torch.zeros(2, dtype=torch.float16), torch.tensor([True, False])
    where = numbers.where(aten.where.ScalarOther, (mask, x, -1e9), {})
    assert where.tolist() == [0, -65504]
    casted = numbers.cast(aten._to_copy.default, (torch.tensor([-1e9]),), {"dtype": torch.float16})
    assert casted.tolist() == [-65504]


def test_numbers_are_held_under_transforms_and_tracers():
    def masked(x: Tensor) -> Tensor:
        with Region(torch.float16).on("cpu"):
            return x.half() + torch.full((2,), -1e9).to(torch.float16)

    assert torch.func.vmap(masked)(torch.zeros(3, 2)).tolist() == [[-65504.0] * 2] * 3
    assert torch.jit.trace(masked, (torch.zeros(2),))(torch.ones(2)).isfinite().all()
