"""Products that sum nothing, and operands of `einsum` that scale another one: beside FP32, no operand is rounded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.torch.casting.region import Region

from .op_by_hand import NARROW, bits

HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])


def by_einsum(equation: str, *operands: Tensor) -> list[Callable[[], Tensor]]:
    """Return the same call in every spelling."""
    return [
        lambda: torch.einsum(equation, *operands),
        lambda: torch.einsum(equation.replace(",", " , "), [*operands]),
        lambda: torch.ops.aten.einsum(equation, [*operands]),
    ]


X, Y, SCALE = torch.linspace(0.5, 2, 6).view(2, 3), torch.linspace(-1, 1, 12).view(3, 4), torch.tensor([2e6, 3e6])
# what is a product of two beside an operand that scales one of them: what it is, after scaling by hand
SCALED: dict[str, tuple[str, tuple[Tensor, ...], str, tuple[Tensor, ...]]] = {
    "last": ("nd,de,n->ne", (X / 1e6, Y, SCALE), "nd,de->ne", (X / 1e6 * SCALE[:, None], Y)),
    "first": ("n,nd,de->ne", (SCALE, X / 1e6, Y), "nd,de->ne", (X / 1e6 * SCALE[:, None], Y)),
    "summed": ("nd,nd,n->d", (X / 1e6, X, SCALE), "nd,nd->d", (X / 1e6 * SCALE[:, None], X)),
    "two": (
        "n,nd,d,de->ne",
        (SCALE, X / 1e6, torch.ones(3) * 3, Y),
        "nd,de->ne",
        (X / 1e6 * SCALE[:, None] * 3, Y),
    ),
    "ellipsis": (
        "...nd,...de,...n->...ne",
        (X[None] / 1e6, Y[None], SCALE[None]),
        "bnd,bde->bne",
        (X[None] / 1e6 * SCALE[:, None], Y[None]),
    ),
}


@HALVES
@pytest.mark.parametrize("name", SCALED)
def test_an_operand_that_scales_another_is_not_rounded(name, dtype):
    equation, operands, plain, by_hand = SCALED[name]
    with Region(dtype).on("cpu"):
        expected = torch.einsum(plain, *by_hand)
        got = [call() for call in by_einsum(equation, *operands)]
    assert expected.isfinite().all()
    assert all(each.dtype == dtype for each in got)
    for each in got:
        # the scaled operand may be off by FP32's last bit
        torch.testing.assert_close(each, expected, rtol=torch.finfo(dtype).eps, atol=0)


@HALVES
def test_it_may_scale_one_in_16_bits(dtype):
    x = (X / 100).to(dtype)
    with Region(dtype).on("cpu"):
        expected = torch.einsum("nd,de->ne", x.float() * SCALE[:, None] / 1e4, Y)
        assert bits(torch.einsum("nd,de,n->ne", x, Y.to(dtype), SCALE / 1e4)) == bits(expected)


@HALVES
@pytest.mark.parametrize(
    ("equation", "operands"),
    [
        # indices of its own, the same index twice, no output, 16 bits
        ("ij,jk,kl->il", (X, Y, Y.mT)),
        ("nn,nd,de->ne", (torch.eye(2), X, Y)),
        ("nd,de,n", (X, Y, SCALE / 1e6)),
        ("nd,de,n->ne", (X, Y, (SCALE / 1e6).half())),
    ],
)
def test_others_are_rounded_as_always(equation, operands, dtype):
    expected = torch.einsum(equation, *(each.to(dtype).float() for each in operands))
    with Region(dtype).on("cpu"):
        got = torch.einsum(equation, *operands)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.02)


OUTER: dict[str, Callable[[Any, Any], Tensor]] = {
    "einsum": lambda x, y: torch.einsum("i,j->ij", x, y),
    "einsum of one index": lambda x, y: torch.einsum("i,i->i", x, y),
    "tensordot": lambda x, y: torch.tensordot(x, y, 0),
    "matmul": lambda x, y: x[:, None] @ y[None],
    "mm": lambda x, y: torch.mm(x[:, None], y[None]),
    "bmm": lambda x, y: torch.bmm(x[None, :, None], y[None, None]),
}


@HALVES
@pytest.mark.parametrize("name", OUTER)
def test_a_product_that_sums_nothing_rounds_once_beside_16_bits(name, dtype):
    x, y = torch.tensor([1e6, 3e6, 713.0]), torch.tensor([1e-4, 1e-5, 2.0]).to(dtype)
    expected = [OUTER[name](x, y.float()).to(dtype), OUTER[name](y.float(), x).to(dtype)]
    with Region(dtype).on("cpu"):
        assert bits([OUTER[name](x, y), OUTER[name](y, x)]) == bits(expected)


class LinearAttention(nn.Module):
    """Attention by features, whose sums are small where keys and queries are far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.map(x).chunk(3, -1)
        q, k = (each.float().softmax(-1) * 1e-3 for each in (q, k))
        per_row = 1 / torch.einsum("nd,d->n", q, k.sum(0))
        return torch.einsum("de,nd,n->ne", torch.einsum("nd,ne->de", k, v), q, per_row)


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_linear_attention_trains(policy):
    torch.manual_seed(0)
    model, x = LinearAttention(), torch.randn(6, 8)
    expected = model(x)
    got = dt.cast(model, policy)(x)
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.05)
    # 1 / den is beyond FP16
    (got.square().mean() / 64).backward()
    assert model.map.weight.grad.isfinite().all()


def test_compiled_whole_it_gives_the_same():
    equation, operands, *_ = SCALED["two"]

    def run() -> Tensor:
        with Region(torch.float16).on("cpu"):
            return torch.einsum(equation, *operands)

    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(), run())
