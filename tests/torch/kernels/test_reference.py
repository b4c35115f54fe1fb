"""The reference operations themselves: statistics of gradients, stochastic rounding, and weights without tails."""

import math

import numpy as np
import pytest
import torch

from duotone import rounding
from duotone.torch.kernels import Rounding, exact, reference
from duotone.torch.kernels.philox import random_16_bits
from duotone.torch.kernels.reference import CHUNK, LANES, PARTS, ROWS, grad_stats
from duotone.torch.kernels.round_stochastically import round_stochastically

from .grid import SETTINGS, UPDATES, make_operand

ONE = torch.ones(())

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def bits16(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_stats_against_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4), (), (0,), (1000,))]
    total, found_inf = grad_stats(grads, ONE / 8)
    expected = sum((grad.double() / 8).square().sum().item() for grad in grads)
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert (total.dtype, total.shape) == (torch.float64, ())
    assert not found_inf.item()


def test_grad_stats_of_nothing():
    total, found_inf = grad_stats([], ONE)
    assert (total.item(), found_inf.item()) == (0.0, False)


def test_tiny_gradients_count():
    total, _ = grad_stats([torch.full((4,), 1e-38)], ONE)
    assert total.sqrt().item() == pytest.approx(2e-38, rel=1e-6)


def test_huge_gradients_are_no_overflow():
    total, found_inf = grad_stats([torch.full((4,), 3e38)], ONE / 2)
    assert total.sqrt().item() == pytest.approx(3e38, rel=1e-6)
    assert not found_inf.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", [0, 63, 100])
def test_one_element_that_is_not_finite_is_found(dtype, bad, position):
    grad = torch.ones(101, dtype=dtype)
    grad[position] = bad
    assert grad_stats([torch.ones(3, dtype=dtype), grad, torch.ones(())], ONE)[1].item()


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_stochastic_rounding_is_that_of_the_reference_rounder(dtype, name):
    generator = np.random.default_rng(0)
    # every exponent, FP32's subnormals and beyond FP16's range included, and more of FP16's subnormals
    anywhere = generator.integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    small = (generator.uniform(-1, 1, 100_000) * np.exp2(generator.integers(-28, -12, 100_000))).astype(np.float32)
    values = np.concatenate([anywhere[np.isfinite(anywhere)], small])
    random = generator.integers(0, 2**16, values.size, np.uint16)
    expected = rounding.encode(values, name, mode="stochastic", random_bits=random)
    rounded = round_stochastically(torch.from_numpy(values), dtype, torch.from_numpy(random.astype(np.int32)))
    np.testing.assert_array_equal(rounded.view(torch.int16).numpy().view(np.uint16), expected)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("numerator", [0, 1, 12345, 65535])
def test_bfloat16_rounds_up_with_the_discarded_fraction(sign, numerator):
    # the master lies numerator / 2^16 of a step above 1.5
    value = torch.full((2**16,), sign * (1.5 + numerator * 2.0**-23))
    rounded = round_stochastically(value, torch.bfloat16, torch.arange(2**16, dtype=torch.int32))
    up = rounded.float() != sign * 1.5
    assert up.sum().item() == numerator
    assert set(rounded.float().tolist()) <= {sign * 1.5, sign * (1.5 + 2.0**-7)}


@pytest.mark.parametrize("base", [1.5, 1024.0, 2.0**-14, 2.0**-15, 2.0**-20, 3 * 2.0**-24])
def test_float16_rounds_up_with_the_discarded_fraction(base):
    low = torch.tensor(base, dtype=torch.float16)
    high = low.nextafter(torch.tensor(torch.inf, dtype=torch.float16))
    step = high.double() - low.double()
    for quarter in (0, 1, 2, 3):
        value = (low.double() + step * quarter / 4).float()
        assert value.double() == low.double() + step * quarter / 4
        rounded = round_stochastically(value.expand(2**16), torch.float16, torch.arange(2**16, dtype=torch.int32))
        assert (rounded == high).sum().item() == quarter * 2**14
        assert ((rounded == high) | (rounded == low)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_format_holds_never_moves(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for random in (0, 65535):
        rounded = round_stochastically(every.float(), dtype, torch.full(every.shape, random, dtype=torch.int32))
        assert torch.equal(rounded.view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_and_the_ends_of_the_range(dtype):
    assert round_stochastically(torch.tensor([math.nan]), dtype, bits16(65535)).isnan().all()
    largest = torch.finfo(dtype).max
    step = largest * torch.finfo(dtype).eps / 2
    value = torch.tensor([largest + 0.25 * step])
    assert round_stochastically(value, dtype, bits16(0)).item() == largest
    assert round_stochastically(value, dtype, bits16(65535)).item() == math.inf
    tiny = torch.tensor([2.0**-140, -(2.0**-140)])
    assert round_stochastically(tiny, dtype, bits16(0, 0)).tolist() == [0.0, -0.0]
    assert torch.equal(round_stochastically(tiny, dtype, bits16(0, 0)).signbit(), tiny.signbit())


def test_the_mean_is_kept():
    # by Hoeffding's bound the mean of 2^20 steps of 2^-7 is off by t with probability at most 2 exp(-2^21 (t / 2^-7)^2)
    generator = torch.Generator().manual_seed(0)
    value = torch.full((2**20,), 1.0 + 0.3 * 2.0**-7)
    random = torch.randint(2**16, (2**20,), generator=generator, dtype=torch.int32)
    error = round_stochastically(value, torch.bfloat16, random).double().mean() - value.double().mean()
    assert abs(error.item()) <= 2.0**-7 * math.sqrt(math.log(2 / 1e-9) / 2**21)


@pytest.mark.parametrize("found_inf", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", Rounding)
def test_a_weight_without_a_tail_is_rounded_as_told(mode, dtype, found_inf):
    generator = torch.Generator().manual_seed(0)
    old = torch.rand((40, 30), generator=generator).to(dtype)
    operand = make_operand(str(dtype).removeprefix("torch."), torch.float32, 0, torch.float32, 1200, 2)
    grad = torch.rand((40, 30), generator=generator)
    operand = operand._replace(weight=old.clone(), grad=grad, rounding=mode)
    settings = SETTINGS["sgd"]._replace(lr=1e-3, seed=9)
    reference.update(UPDATES["sgd"], [operand], [settings], ONE, torch.tensor(found_inf))
    exact = old.float() - grad * 1e-3
    random = random_16_bits(1200, seed=9, step=torch.tensor(5), parameter=2).view(40, 30)
    rounded = exact.to(dtype) if mode == Rounding.NEAREST else round_stochastically(exact, dtype, random)
    assert torch.equal(operand.weight, old if found_inf else rounded)
    assert not torch.equal(rounded, old)
    assert operand.step.item() == (5 if found_inf else 6)


def test_moments_in_bfloat16_keep_the_mean_that_nearest_rounding_would_lose():
    # v = 0.999 v + 0.001 g^2 moves by less than half a step of BF16, so that to nearest it would stand still for ever
    operand = make_operand("float32", torch.float32, 2, torch.bfloat16, 2**14, 0)
    operand.moments[1].fill_(1.0)
    operand.grad.fill_(0.0)
    for _ in range(100):
        reference.update(UPDATES["adamw"], [operand], [SETTINGS["adamw"]], ONE, torch.tensor(False))
    expected = 0.999**100
    # each step adds at most one step of 2^-8: by Hoeffding's bound the mean of 2^14 is off by more than this with
    # probability 1e-9 at most
    bound = 2.0**-8 * math.sqrt(100 * math.log(2e9) / 2 / 2**14)
    assert abs(operand.moments[1].double().mean().item() - expected) < bound
    assert bound < (1 - expected) / 10


def test_the_square_root_is_rounded_to_nearest():
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    expected = np.float32(values.double().numpy() ** 0.5)
    assert np.array_equal(exact.sqrt(values).numpy(), expected)
    assert exact.sqrt(torch.tensor(2.0, dtype=torch.float64)).item() == math.sqrt(2.0)


def test_sums_have_one_order():
    generator = np.random.default_rng(0)
    grad = generator.standard_normal(CHUNK + 5000).astype(np.float32)
    squares = np.zeros(2 * CHUNK)
    squares[: grad.size] = grad.astype(np.float64) ** 2
    expected = []
    for chunk in squares.reshape(2, PARTS, ROWS, LANES):
        sums = np.zeros((PARTS, LANES))
        for row in range(ROWS):
            sums += chunk[:, row]
        sums = sums.ravel()
        while sums.size > 1:
            sums = sums[: sums.size // 2] + sums[sums.size // 2 :]
        expected.append(sums[0])
    assert grad_stats([torch.from_numpy(grad)], ONE)[0].item() == expected[0] + expected[1]


@pytest.mark.parametrize(("moment", "value", "direction"), [(1.0, -2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, 2.0, -1.0)])
def test_lion_goes_by_the_sign_of_what_it_remembers(moment, value, direction):
    operand = make_operand("float32", torch.float32, 1, torch.float32, 1, 1)
    operand.weight.fill_(1.0)
    operand.moments[0].fill_(moment)
    operand.grad.fill_(value)
    settings = SETTINGS["lion"]._replace(lr=0.125, beta1=0.75, beta2=0.5, weight_decay=1.0)
    reference.update(UPDATES["lion"], [operand], [settings], ONE, torch.tensor(False))
    assert operand.weight.item() == 0.875 - 0.125 * direction
    assert operand.moments[0].item() == 0.5 * moment + 0.5 * value
