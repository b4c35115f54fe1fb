"""The split master-weight codec: what it keeps, how it rounds, and what it makes of edited weights."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from duotone import rounding
from duotone.torch.kernels import codec, decode, encode

EVERY_16_BITS = np.arange(2**16, dtype=np.uint32)
# where the tail's sign and BF16's rounding turn
EDGE_TAILS = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
FP16_EXACT = 2.0**-16

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def floats(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def codes(weight: Tensor) -> np.ndarray:
    return weight.view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(scope="module")
def masters_for_bfloat16() -> Tensor:
    """Return every upper half of an FP32 pattern with edge and random lower halves."""
    drawn = np.random.default_rng(0).integers(0, 2**16, EVERY_16_BITS.size, np.uint32)
    return floats(np.stack([(EVERY_16_BITS << 16) | low for low in (*EDGE_TAILS, drawn)]))


@pytest.fixture(scope="module")
def masters_for_float16() -> Tensor:
    """Return finite masters: all FP16 numbers, the ties between them, their FP32 neighbours, and random ones."""
    numbers = EVERY_16_BITS.astype(np.uint16).view(np.float16).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    bits = np.concatenate([numbers, ties]).astype(np.float32).view(np.uint32)
    # +-1 must not turn +0 into a NaN's pattern
    near = np.concatenate([bits, bits + 1, bits[bits & 0x7FFFFFFF != 0] - 1])
    drawn = np.random.default_rng(1).integers(0, 2**32, 500_000, np.uint32)
    masters = np.concatenate([near, drawn, [0x80000000]]).astype(np.uint32).view(np.float32)
    return torch.from_numpy(masters[np.abs(masters) < 65520.0])


def test_bfloat16_keeps_every_bit(masters_for_bfloat16, same_bits):
    decoded = decode(*encode(masters_for_bfloat16, torch.bfloat16))
    is_nan = masters_for_bfloat16.isnan()
    assert same_bits(decoded[~is_nan], masters_for_bfloat16[~is_nan])
    assert decoded[is_nan].isnan().all()


def test_bfloat16_weights_are_nearest_with_ties_away(masters_for_bfloat16):
    weight, tail = encode(masters_for_bfloat16, torch.bfloat16)
    # a NaN becomes the quiet one of its sign, the same as here
    expected = rounding.encode(masters_for_bfloat16.numpy(), "bf16", mode="ties_away")
    np.testing.assert_array_equal(codes(weight), expected)
    assert (tail.dtype, tail.shape) == (torch.int16, masters_for_bfloat16.shape)
    assert not tail[masters_for_bfloat16.isnan()].any()


def test_float16_keeps_every_bit_from_two_to_the_minus_16_on(masters_for_float16, same_bits):
    weight, tail = encode(masters_for_float16, torch.float16)
    exact = weight.float().abs() >= FP16_EXACT
    assert exact.float().mean() > 0.1
    assert same_bits(decode(weight, tail)[exact], masters_for_float16[exact])
    assert same_bits(weight[exact], masters_for_float16[exact].half())


def test_float16_is_within_two_to_the_minus_41_below_that(masters_for_float16):
    weight, tail = encode(masters_for_float16, torch.float16)
    small = weight.float().abs() < FP16_EXACT
    assert small.float().mean() > 0.1
    master = masters_for_float16[small].double()
    assert ((decode(weight, tail)[small].double() - master).abs() <= 2.0**-41).all()
    # the nearest weight of the spacing 2^-24, but for ties of what was put on the grid of 2^-40
    assert ((weight[small].double() - master).abs() <= 2.0**-25 + 2.0**-41).all()
    assert (weight[small].signbit() == masters_for_float16[small].signbit()).all()


def test_float16_overflows_where_ieee_says():
    weight, tail = encode(torch.tensor([65519.99, 65520.0, -3e38]), torch.float16)
    assert weight.tolist() == [65504.0, math.inf, -math.inf]
    assert decode(weight, tail).tolist() == pytest.approx([65519.99, math.inf, -math.inf])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_special_values(dtype, same_bits):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 2.0**-149, -(2.0**-149), 2.0**-126])
    decoded = decode(*encode(special, dtype))
    kept = slice(None) if dtype == torch.bfloat16 else slice(4)
    assert same_bits(decoded[kept], special[kept])
    # a NaN whose payload is all ones would be rounded to -0, one whose payload is low to Inf
    nans = floats(np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000]))
    weight, tail = encode(nans, dtype)
    assert weight.isnan().all()
    assert not tail.any()
    assert weight.signbit().tolist() == [False, True, False, True, False]
    assert decode(weight, tail).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_follows_an_edited_weight(dtype):
    weight = torch.from_numpy(EVERY_16_BITS.astype(np.uint16).view(np.int16)).view(dtype)
    random_tails = np.random.default_rng(2).integers(0, 2**16, weight.numel())
    for tail in (*EDGE_TAILS, 0x1000, 0xF000, random_tails):
        tails = torch.from_numpy(np.broadcast_to(tail, weight.shape).astype(np.uint16).view(np.int16))
        master = decode(weight, tails)
        assert torch.equal(master.isnan(), weight.isnan())
        again, _ = encode(master, dtype)
        # a master halfway between -2^-16 and the weight above it is encoded as that one, which is as near
        compared = ~weight.isnan() & (master != -255.5 * 2.0**-24)
        # values, not bits: -0 is taken for 0
        assert torch.equal(again[compared], weight[compared])
    zeros = torch.zeros_like(weight, dtype=torch.int16)
    assert torch.equal(decode(weight, zeros).nan_to_num(7.0), weight.float().nan_to_num(7.0))


def test_an_infinite_weight_stays_so_unless_its_tail_says_what_overflowed():
    infinities = torch.tensor([torch.inf, -torch.inf])
    for tail in (-0x8000, -0x1000, -1, 1, 0x7FFF):
        tails = torch.full((2,), tail, dtype=torch.int16)
        assert torch.equal(decode(infinities.half(), tails), infinities)
        # in BF16 a finite master that rounds to Inf is kept, and only its upper half can tell
        assert torch.equal(decode(infinities.bfloat16(), tails).isinf(), torch.tensor([tail > 0] * 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "masters",
    [
        torch.empty(0, 3),
        torch.tensor(1.1),
        drawn(6, 5).t(),
        drawn(9, 8)[::2, 1::3],
        drawn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    ],
    ids=["empty", "0-d", "transposed", "strided", "channels_last"],
)
def test_any_shape_and_layout(masters, dtype):
    weight, tail = encode(masters, dtype)
    assert (weight.dtype, tail.dtype) == (dtype, torch.int16)
    assert torch.equal(weight, masters.to(dtype))
    assert torch.equal(decode(weight, tail), masters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_have_the_bits_of_the_whole(dtype, masters_for_bfloat16, masters_for_float16, monkeypatch, same_bits):
    masters = masters_for_bfloat16 if dtype == torch.bfloat16 else masters_for_float16
    assert masters.numel() > codec._PIECE
    pieces = encode(masters, dtype)
    decoded = decode(*pieces)
    monkeypatch.setattr(codec, "_PIECE", masters.numel())
    whole = encode(masters, dtype)
    assert all(map(same_bits, (*pieces, decoded), (*whole, decode(*whole))))
