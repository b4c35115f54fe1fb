"""Philox4x32-10: the published known answers, and which element draws which bits."""

import pytest
import torch

from duotone.torch.kernels.philox import philox4x32, random_16_bits


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


def draw(numel: int, seed: int = 5, step: int = 3, parameter: int = 2) -> torch.Tensor:
    return random_16_bits(numel, seed=seed, step=torch.tensor(step), parameter=parameter)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    assert tuple(word.item() for word in philox4x32(words(*counter), key)) == expected


def test_counters_broadcast():
    blocks = torch.arange(4)
    zero = torch.tensor(0)
    together = philox4x32((blocks, zero, zero, zero), (7, 8))
    for block in range(4):
        alone = philox4x32(words(block, 0, 0, 0), (7, 8))
        assert [word[block].item() for word in together] == [word.item() for word in alone]


def test_an_element_draws_its_half_word_of_its_block():
    drawn = draw(20, seed=0x1_2345_6789, step=11, parameter=4)
    for element in range(20):
        block = philox4x32(words(element // 8, 0, 11, 4), (0x2345_6789, 1))
        word = block[element % 8 // 2].item()
        assert drawn[element] == (word >> 16 if element % 2 else word & 0xFFFF)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 100])
def test_how_many_are_asked_for_changes_none(numel):
    assert torch.equal(draw(numel), draw(1000)[:numel])
    assert draw(numel).dtype == torch.int32


@pytest.mark.parametrize("other", [{"seed": 6}, {"seed": 5 + 2**32}, {"step": 4}, {"parameter": 3}])
def test_seed_step_and_parameter_each_give_other_bits(other):
    # 1000 pairs of 16 random bits agree in a few places at most: 20 or more has a probability below 1e-30
    assert (draw(1000) == draw(1000, **other)).sum() < 20


def test_any_integer_is_a_seed():
    assert torch.equal(draw(10, seed=-1), draw(10, seed=2**64 - 1))
    assert torch.equal(draw(10, seed=2**64), draw(10, seed=0))


def test_bits_are_uniform():
    drawn = draw(2**18)
    assert drawn.min() >= 0
    assert drawn.max() < 2**16
    ones = torch.stack([(drawn >> bit & 1).sum() for bit in range(16)])
    # hoeffding and the union over 16 bits: uniform bits exceed this with probability 1e-9 at most
    bound = (2**18 * torch.tensor(32e9).log() / 2).sqrt()
    assert (ones - 2**17).abs().max() < bound
