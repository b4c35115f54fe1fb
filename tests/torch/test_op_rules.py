"""Regions: torch.autocast's dtypes without its stale weights, restored whatever happens inside."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from duotone.torch.op_rules import Region

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def x() -> Tensor:
    return torch.linspace(-2, 2, 96).view(4, 24)


OPERATIONS = {
    "linear": lambda: F.linear(x(), x()),
    "matmul of 16 and 32 bits": lambda: x().bfloat16() @ x().T,
    "conv": lambda: F.conv1d(x().view(1, 4, 24), x().view(2, 4, 12)),
    "attention": lambda: F.scaled_dot_product_attention(*[x().view(1, 2, 6, 8)] * 3),
    "softmax": lambda: F.softmax(x().bfloat16(), -1),
    "gelu": lambda: F.gelu(x().bfloat16()),
    "layer_norm": lambda: F.layer_norm(x().bfloat16(), (24,)),
    "layer_norm of float32": lambda: F.layer_norm(x(), (24,)),
    "sum": lambda: x().bfloat16().sum(),
    "mse_loss": lambda: F.mse_loss(x().bfloat16(), x().bfloat16() * 2),
    "cross_entropy": lambda: F.cross_entropy(x().bfloat16(), torch.tensor([0, 1, 2, 3])),
    "fft": lambda: torch.fft.rfft(x().bfloat16()).real,
    "embedding": lambda: F.embedding(torch.tensor([0, 3, 3]), x().bfloat16()),
    "float64": lambda: x().double() @ x().double().T,
    "integers": lambda: x().long() @ x().long().T,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_bfloat16_region_gives_what_autocast_gives(name, same_bits):
    operation = OPERATIONS[name]
    with torch.autocast("cpu", torch.bfloat16):
        expected = operation()
    with Region(torch.bfloat16).on("cpu"):
        got = operation()
    assert same_bits(got, expected)


@HALVES
def test_a_weight_that_changes_inside_is_seen(dtype):
    # under one torch.autocast the second product would use the cached cast of the first weight
    weight = nn.Parameter(torch.ones(1, 1))
    with Region(dtype).on("cpu"):
        assert F.linear(torch.ones(1, 1), weight).item() == 1.0
        with torch.no_grad():
            weight.fill_(2.0)
        assert F.linear(torch.ones(1, 1), weight).item() == 2.0


@HALVES
def test_a_float32_region_ends_what_is_around_it(dtype):
    with Region(dtype).on("cpu"):
        with Region(torch.float32).on("cpu"):
            inside = x() @ x().T
        assert (x() @ x().T).dtype == dtype
    assert inside.dtype == torch.float32
    assert torch.equal(inside, x() @ x().T)


def test_the_inner_of_two_regions_holds():
    with Region(torch.bfloat16).on("cpu"):
        with Region(torch.float16).on("cpu"):
            assert (x() @ x().T).dtype == torch.float16
        assert (x() @ x().T).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_left_behind(dtype):
    def state() -> tuple[object, ...]:
        modes = tuple(_get_current_function_mode_stack())
        return (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            modes,
        )

    before = state()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), Region(dtype).on("cpu"):
        x() @ x()
    assert state() == before
    with Region(dtype).on("cpu"):
        assert dtype == torch.float32 or state() != before
    assert state() == before


@HALVES
def test_a_region_knows_whether_it_still_holds(dtype):
    region = Region(dtype)
    assert not region.still_holds("cpu")
    with region.on("cpu"):
        assert region.still_holds("cpu")
    # where autocast is all there is, it is restored by whoever restores autocast
    assert region.still_holds("cuda")
    assert Region(torch.float32).still_holds("cpu")
