"""Attention by Duotone's kernels: no further from FP64 than torch's in BF16, saves as little, and leaves the rest."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import duotone.torch as dt
from duotone.torch.casting.float32_inside.attention import attention
from duotone.torch.kernels.attention import attention_kernels
from duotone.torch.kernels.cpu.attention.sizes import TILE
from duotone.torch.watching import saved_for_backward

KERNELS = attention_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="needs a CPU that multiplies BF16, without AMX")
torchs = F.scaled_dot_product_attention

# batch, heads, key heads, queries, keys, width
SHAPES = [
    (2, 4, 4, 100, 100, 64),
    (1, 4, 2, 33, 70, 64),
    (1, 2, 1, 97, 1, 16),
    (1, 2, 2, 50, 600, 48),
    (1, 1, 1, 130, 129, 128),
]
MORE_SHAPES = [
    (1, 4, 2, 33, 70, 32),
    (3, 2, 1, 1100, 1100, 64),
    (1, 2, 2, 40, 200, 80),
    (2, 3, 3, 256, 256, 96),
    (1, 8, 2, 513, 511, 256),
    (1, 1, 1, 1, 3000, 112),
    (1, 2, 2, 2000, 65, 32),
]


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FEW_QUERIES", "_LITTLE_WORK"):
        monkeypatch.setattr(f"duotone.torch.casting.float32_inside.attention.{name}", 1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def operands(shape: tuple[int, ...], spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return query, key, value and the gradient of the result, heads side by side in memory."""
    batch, heads, key_heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(rows: int, heads: int, spread: float = 1.0) -> Tensor:
        drawn = torch.randn(batch, rows, heads, width, generator=generator) * spread
        return drawn.bfloat16().transpose(1, 2)

    return draw(queries, heads, spread), draw(keys, key_heads), draw(keys, key_heads), draw(queries, heads)


def results(call: Callable[..., Tensor], given: tuple[Tensor, ...], **named: Any) -> tuple[Tensor, ...]:
    """Return the result and the three gradients."""
    *inputs, grad = given
    leaves = [each.detach().requires_grad_() for each in inputs]
    output = call(*leaves, **named)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def ours(*args: Any, **named: Any) -> Tensor:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("torch's attention was called")

    return attention(refuse, *args, **named)


def by_formula(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Return causal attention with the whole matrix; torch's own gives 0 where a score is NaN."""
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value


def distances(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[tuple[float, float]]:
    """Return for each tensor the largest and the relative Euclidean distance from FP64's."""
    pairs = zip(found, exact, strict=True)
    return [
        (
            (one.double() - other).abs().max().item(),
            ((one.double() - other).norm() / other.norm().clamp(min=1e-9)).item(),
        )
        for one, other in pairs
    ]


def check(shape: tuple[int, ...], is_causal: bool, spread: float) -> None:
    given = operands(shape, spread)
    named = {"is_causal": is_causal, "enable_gqa": shape[1] != shape[2]}
    exact = results(torchs, tuple(each.double() for each in given), **named)
    found = distances(results(ours, given, **named), exact)
    # torch's own, or a rounding of each result: whichever is further
    allowed = distances(results(torchs, given, **named), exact)
    rounded = distances(tuple(each.bfloat16() for each in exact), exact)
    for (largest, relative), (their_largest, their_relative), (least, least_relative) in zip(
        found, allowed, rounded, strict=True
    ):
        assert largest <= max(1.5 * their_largest, 2 * least)
        assert relative <= max(1.2 * their_relative, 1.1 * least_relative)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_near_to_fp64_as_torchs(shape: tuple[int, ...], is_causal: bool) -> None:
    check(shape, is_causal, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize("shape", [*SHAPES, *MORE_SHAPES])
def test_is_as_near_to_fp64_as_torchs_in_a_sweep(shape: tuple[int, ...], spread: float, is_causal: bool) -> None:
    check(shape, is_causal, spread)


@pytest.mark.parametrize("threads", [2, 3])
def test_gives_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    given = operands((2, 3, 3, 150, 150, 64))
    one = results(ours, given, is_causal=True)
    torch.set_num_threads(threads)
    assert all(map(torch.equal, one, results(ours, given, is_causal=True)))


def test_takes_a_scale_and_any_strides() -> None:
    query, key, value, grad = operands((1, 2, 2, 40, 40, 64))
    odd = tuple(each.transpose(2, 3).contiguous().transpose(2, 3) for each in (query, key, value, grad))
    found, expected = results(ours, odd, scale=0.5), results(ours, (query, key, value, grad), scale=0.5)
    assert all(map(torch.equal, found, expected))
    exact = results(torchs, tuple(each.double() for each in odd), scale=0.5)
    assert max(relative for _, relative in distances(found, exact)) < 1e-2
    # a gradient that is one number, read everywhere
    spread = query, key, value, torch.ones(()).bfloat16().expand(query.shape)
    assert all(map(torch.equal, results(ours, spread), results(ours, (*spread[:3], torch.ones_like(query)))))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_and_inf_show(place: int) -> None:
    given = operands((1, 1, 1, 64, 64, 16))
    for number in (math.nan, math.inf):
        spoiled = [each.clone() for each in given[:3]]
        spoiled[place][0, 0, 40, 3] = number
        found, expected = ours(*spoiled, is_causal=True), by_formula(*(each.double() for each in spoiled))
        # a hidden value is multiplied by 0, for the other queries of its tile
        assert found[..., : 40 // TILE * TILE, :].isfinite().all()
        assert (found[..., 42:, :].isfinite() == expected[..., 42:, :].isfinite()).all()


def test_scores_far_apart_underflow_and_do_not_overflow() -> None:
    query, key, value, grad = operands((1, 1, 1, 64, 600, 16), spread=2000.0)
    found = results(ours, (query, key, value, grad))
    exact = results(torchs, tuple(each.double() for each in (query, key, value, grad)))
    assert all(each.isfinite().all() for each in found)
    assert distances(found, exact)[0][1] < 1e-2


def test_saves_operands_the_result_and_a_number_for_each_query() -> None:
    leaves = [each.detach().requires_grad_() for each in operands((1, 2, 2, 256, 256, 64))[:3]]
    with saved_for_backward([]) as saved:
        ours(*leaves, is_causal=True)
    assert saved.total_activation_bytes == 4 * 2 * 256 * 64 * 2 + 2 * 256 * 4


def test_second_derivatives_are_those_of_fp32() -> None:
    given = operands((1, 2, 1, 40, 40, 16))

    def second(call: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [each.detach().to(dtype).requires_grad_() for each in given[:3]]
        output = call(*leaves, is_causal=True, enable_gqa=True)
        first = torch.autograd.grad(output, leaves, given[3].to(dtype), create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), leaves)

    exact = second(by_formula, torch.float64)
    assert max(relative for _, relative in distances(second(ours, torch.bfloat16), exact)) < 2e-2


class _Looks(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_leaves_to_torch_what_the_kernels_do_not_take() -> None:
    calls: list[Any] = []

    def torch_function(*args: Any, **named: Any) -> Tensor:
        calls.append(args)
        return torchs(*args, **named)

    query, key, value, _ = operands((1, 2, 2, 40, 40, 64))
    others = [
        lambda: attention(torch_function, query, key, value, torch.ones(40, 40, dtype=torch.bool)),
        lambda: attention(torch_function, query, key, value, dropout_p=0.5),
        lambda: attention(torch_function, query.half(), key.half(), value.half()),
        lambda: attention(torch_function, query[..., :20], key[..., :20], value[..., :20]),
        lambda: attention(torch_function, query, key, value[..., :16]),
        lambda: attention(torch_function, query, key, value, scale=-1.0),
        lambda: attention(torch_function, query[0], key[0], value[0]),
        lambda: torch.func.vmap(lambda x: attention(torch_function, x, x, x))(query[None]),
    ]
    for number, call in enumerate(others, 1):
        call()
        assert len(calls) == number
    with _Looks():
        attention(torch_function, query, key, value)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        attention(torch_function, query, key, value)
    assert len(calls) == len(others) + 2


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def test_cast_models_and_regions_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("forward", "backward"):
        kernel = getattr(KERNELS, name)

        def note(*args: Any, name: str = name, kernel: Any = kernel) -> Any:
            used.append(name)
            return kernel(*args)

        monkeypatch.setattr(KERNELS, name, note)
    torch.manual_seed(0)
    x, model = torch.randn(1, 64, 32), _Attends()
    exact = model(x)
    with dt.autocast("cpu", torch.bfloat16):
        found = model(x)
    found.float().sum().backward()
    assert used == ["forward", "backward"]
    assert torch.allclose(found.float(), exact, atol=3e-2)
    dt.cast(model, "bf16")
    model(x).float().sum().backward()
    with torch.no_grad():
        assert torch.allclose(model(x).float(), exact, atol=3e-2)
    assert used == ["forward", "backward"] * 2 + ["forward"]
