"""Random programs: a function mode around a region changes neither dtype nor bit of results and gradients.

Regions inside of another function mode go through a mode of their own, others through torch's dispatcher where it
serves; both are to be the same.
"""

import random
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import duotone.torch as dt

from .computation import NARROW

SIZE = 4
ROWS = torch.tensor([0, 2, 2, 1])
# all take and give a square, of moderate size
ONE: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.exp().clamp(max=3.0),
    lambda x: torch.log1p(x.abs()),
    lambda x: x.softmax(-1),
    lambda x: F.log_softmax(x, 0) / 4,
    lambda x: F.layer_norm(x, (SIZE,)),
    lambda x: F.layer_norm(x, (SIZE,), torch.full((SIZE,), 0.7), torch.full((SIZE,), 0.1, dtype=x.dtype)),
    lambda x: F.rms_norm(x, (SIZE,)),
    lambda x: F.group_norm(x, 2),
    lambda x: F.batch_norm(x, None, None, training=True),
    lambda x: F.gelu(x, approximate="tanh"),
    F.silu,
    lambda x: x.tanh(),
    lambda x: (x + 1e-6).mul(2),
    lambda x: 1 / (2 + x.abs()),
    lambda x: x / 3.0,
    lambda x: x - x.mean(-1, keepdim=True),
    lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    lambda x: x.sum(0, keepdim=True).expand(SIZE, SIZE) / SIZE,
    lambda x: x.cumsum(-1) / 2,
    lambda x: x / (x.norm(dim=-1, keepdim=True) + 1),
    F.normalize,
    lambda x: x.var(-1, keepdim=True) + x,
    lambda x: x[ROWS],
    lambda x: x.index_select(0, ROWS),
    lambda x: F.embedding(ROWS, x),
    lambda x: x.gather(1, ROWS.expand(SIZE, SIZE)),
    lambda x: x.masked_fill(x > 1, 0.3),
    lambda x: torch.where(x > 0, x, 0.1),
    lambda x: x.view(2, 8).T.reshape(SIZE, SIZE),
    lambda x: torch.cat([x[:2].float(), x[2:]]),
    lambda x: torch.stack([x[0], x[1], x[2].double().to(x.dtype), x[3]]),
    lambda x: F.avg_pool1d(x[None], 3, 1, 1)[0],
    lambda x: F.max_pool1d(x[None], 3, 1, 1)[0],
    lambda x: F.pad(x[:, 1:-1], (1, 1), value=0.5),
    lambda x: F.conv1d(x[None], torch.full((SIZE, SIZE, 3), 0.1), padding=1)[0],
    lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], is_causal=True)[0, 0],
    lambda x: x.clone().add_(0.25),
    lambda x: x.clone().index_add_(0, ROWS, x.detach()),
    lambda x: x.new_zeros(SIZE, SIZE).scatter_add(0, ROWS.expand(SIZE, SIZE), x),
    lambda x: x.bfloat16(),
    lambda x: x.float(),
    lambda x: x.half().to(torch.bfloat16),
    lambda x: x.detach() + x / 2,
    lambda x: x.square() / 2,
    lambda x: x.sort(-1)[0],
    lambda x: x.logsumexp(-1, keepdim=True) - x,
    F.softplus,
    lambda x: x.sigmoid(),
    lambda x: x**3 / 4,
    lambda x: x.clamp(-0.9, 1e-9),
]
TWO: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, y: x @ y,
    lambda x, y: F.linear(x, y, y[0]),
    lambda x, y: torch.einsum("ij,kj->ik", x, y) / 2,
    lambda x, y: torch.addmm(x, x, y.to(x.dtype)),
    lambda x, y: torch.bmm(x[None], y[None])[0],
    lambda x, y: x + y,
    lambda x, y: x * y,
    lambda x, y: torch.sub(x, y, alpha=0.5),
    torch.maximum,
    lambda x, y: torch.cat([x[:1], y[1:]]),
    lambda x, y: torch.where(x > y, x, y),
    lambda x, y: torch.lerp(x, y, 0.25),
    lambda x, y: torch.addcmul(x, x, y, value=0.5),
    lambda x, y: F.mse_loss(x, y, reduction="none"),
    lambda x, y: x.T.matmul(y),
    lambda x, y: torch.outer(x[0], y[0]),
    lambda x, y: F.cosine_similarity(x, y)[:, None] * x,
    lambda x, y: x + F.cross_entropy(y, ROWS),
    lambda x, y: torch.atan2(x, y.abs() + 1),
]


class Passes(TorchFunctionMode):
    """Calls what it is given."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def steps_of(seed: int, length: int = 8) -> list[tuple[Callable[..., Tensor], tuple[int, ...]]]:
    """Return functions, and which of the tensors that are there by then they take."""
    draw = random.Random(seed)
    found: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []
    for number in range(length):
        count, functions = draw.choice([(1, ONE), (2, TWO)])
        # the last one, and any other
        places = [number + 2, draw.randrange(number + 3)]
        found.append((draw.choice(functions), tuple(places[:count])))
    return found


def results_of(seed: int, dtype: torch.dtype, in_mode: bool) -> list[Tensor]:
    """Return all that a program computes, and the gradients of its leaves."""
    values = torch.Generator().manual_seed(seed)
    kinds = random.Random(seed)
    leaves = [
        torch.randn(SIZE, SIZE, generator=values).to(kinds.choice([torch.float32, dtype])).requires_grad_()
        for _ in range(3)
    ]
    tensors: list[Tensor] = list(leaves)
    with Passes() if in_mode else nullcontext(), dt.autocast("cpu", dtype):
        for function, places in steps_of(seed):
            tensors.append(function(*(tensors[place] for place in places)))
        loss = sum(each.float().mean() for each in tensors)
    loss.backward()
    return [*tensors, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.detach().nan_to_num(7), other.detach().nan_to_num(7))


def assert_same(seed: int, dtype: torch.dtype) -> None:
    one, other = results_of(seed, dtype, False), results_of(seed, dtype, True)
    differing = [number for number, pair in enumerate(zip(one, other, strict=True)) if not same(*pair)]
    assert not differing, (seed, differing, [each.dtype for each in one], [each.dtype for each in other])


@pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
@pytest.mark.parametrize("block", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in range(1, 10))])
def test_a_mode_around_changes_no_bit(block, dtype):
    for seed in range(50 * block, 50 * block + 50):
        assert_same(seed, dtype)
