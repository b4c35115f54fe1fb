"""Losses and layers as people write them by hand, in code that was made for torch.autocast on CUDA: near FP32's.

Numbers that 16 bits do not have stand in most of them, and squares, exponentials and sums without a function of torch.
"""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import duotone.torch as dt

pytestmark = pytest.mark.filterwarnings("ignore")

LABELS = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4, 4, 1, 0, 3, 7, 7, 2, 5])


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def focal(log_p: Tensor) -> Tensor:
    log_p = log_p.gather(1, LABELS[:, None])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def contrastive(similarity: Tensor) -> Tensor:
    return -torch.log(similarity.diag() / similarity.sum(-1)).mean()


def attend_linearly(q: Tensor, v: Tensor) -> Tensor:
    return (q @ (q.mT @ v)) / (q @ q.sum(0)[:, None] + 1e-6)


BY_HAND: Mapping[str, Callable[[Tensor], Tensor]] = {
    "x**2 sum": lambda z: (z**2).sum(-1).mean(),
    "var by hand": lambda z: (z - z.mean(-1, keepdim=True)).pow(2).mean(),
    "std by hand": lambda z: ((z - z.mean(-1, keepdim=True)).pow(2).mean(-1) + 1e-5).sqrt().mean(),
    "RMSNorm by hand": lambda z: (
        (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6) * torch.arange(8)).sum(-1).pow(2).mean()
    ),
    "RMSNorm sqrt": lambda z: (
        (z / ((z * z).mean(-1, keepdim=True) + 1e-6).sqrt() * torch.arange(8)).sum(-1).pow(2).mean()
    ),
    "LayerNorm by hand": lambda z: (
        ((z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-6) * torch.arange(8)).sum(-1).pow(2).mean()
    ),
    "gelu tanh": lambda z: (0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))).pow(2).mean(),
    "quick gelu": lambda z: (z * torch.sigmoid(1.702 * z)).pow(2).mean(),
    "silu by hand": lambda z: (z / (1 + torch.exp(-z))).pow(2).mean(),
    "softplus by hand": lambda z: torch.log(1 + torch.exp(z)).mean(),
    "logsumexp by hand": lambda z: z.exp().sum(-1).log().mean(),
    "softmax by hand": lambda z: (
        ((z - z.amax(-1, keepdim=True)).exp() / (z - z.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True))
        .pow(2)
        .sum(-1)
        .mean()
    ),
    "sigmoid*log": lambda z: (
        -(z.sigmoid() * torch.log(z.sigmoid() + 1e-8) + (1 - z.sigmoid()) * torch.log(1 - z.sigmoid() + 1e-8)).mean()
    ),
    "bce by hand eps 1e-7": lambda z: (
        -(torch.log(z.sigmoid().clamp(1e-7, 1 - 1e-7))).mean() - torch.log(1 - z.sigmoid().clamp(1e-7, 1 - 1e-7)).mean()
    ),
    "cosine by hand": lambda z: ((z @ z.mT) / (z.norm(dim=-1, keepdim=True) * z.norm(dim=-1) + 1e-8)).pow(2).mean(),
    "cosine sqrt": lambda z: (
        (z * z.flip(0)).sum(-1).div((z * z).sum(-1).sqrt() * (z.flip(0) ** 2).sum(-1).sqrt() + 1e-8).mean()
    ),
    "attention": lambda z: (
        (((z @ z.mT) / math.sqrt(8)).masked_fill(torch.ones(16, 16).triu(1).bool(), -1e9).softmax(-1) @ z).pow(2).mean()
    ),
    "attention add": lambda z: (
        (((z @ z.mT) * 8**-0.5 + torch.full((16, 16), -1e9).triu(1)).softmax(-1) @ z).pow(2).mean()
    ),
    "attention add half": lambda z: (
        (((z @ z.mT) * 8**-0.5 + torch.full((16, 16), -1e9).triu(1).to(z.dtype)).softmax(-1) @ z).pow(2).mean()
    ),
    "focal": lambda z: focal(F.log_softmax(z, -1)),
    "focal p": lambda z: focal(torch.log(z.softmax(-1) + 1e-8)),
    "label smoothing": lambda z: -(F.log_softmax(z, -1) * (F.one_hot(LABELS, 8) * 0.9 + 0.1 / 8)).sum(-1).mean(),
    "InfoNCE": lambda z: F.cross_entropy(unit(z) @ unit(z).mT / 0.07, torch.arange(16)),
    "InfoNCE exp": lambda z: contrastive(torch.exp(unit(z) @ unit(z).mT / 0.05)),
    "Dice": lambda z: (
        1 - (2 * (z.sigmoid() * (LABELS[:, None] > 3)).sum() + 1e-6) / (z.sigmoid().sum() + (LABELS > 3).sum() + 1e-6)
    ),
    "KL by hand": lambda z: (z.softmax(-1) * (z.softmax(-1).log() - F.log_softmax(z.flip(0), -1))).sum(-1).mean(),
    "KL gauss": lambda z: -0.5 * (1 + z - z.pow(2) - z.exp()).mean(),
    "entropy": lambda z: -(z.softmax(-1) * F.log_softmax(z, -1)).sum(-1).mean(),
    "nll log(softmax)": lambda z: F.nll_loss(torch.log(z.softmax(-1) + 1e-12), LABELS),
    "norm clamp": lambda z: (z / z.norm(dim=-1, keepdim=True).clamp(min=1e-12)).sum(),
    "norm sqrt(sum)": lambda z: (z / torch.sqrt((z**2).sum(-1, keepdim=True) + 1e-12)).pow(2).mean(),
    "charbonnier": lambda z: torch.sqrt(z * z + 1e-6).mean(),
    "sqrt eps": lambda z: torch.sqrt(z.relu() + 1e-8).mean(),
    "linear attention": lambda z: attend_linearly(F.elu(z) + 1, z).pow(2).mean(),
    "smape": lambda z: ((z - z.flip(0)).abs() / (z.abs() + z.flip(0).abs() + 1e-8)).mean(),
    "mean of 70000": lambda z: z.repeat(1, 9000).mean(),
    "max-min": lambda z: ((z - z.amin()) / (z.amax() - z.amin() + 1e-8)).mean(),
    "cumprod": lambda z: torch.cumprod(1 - z.sigmoid() + 1e-10, -1).mean(),
    "topk -inf": lambda z: z.scatter(-1, z.topk(4).indices, -1e9).softmax(-1).pow(2).mean(),
}


class ByHand(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.name = nn.Linear(8, 8), name

    def forward(self, x: Tensor) -> Tensor:
        return BY_HAND[self.name](self.linear(x))


def trained(model: ByHand, scale: float) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    loss = model(x)
    (loss.float() * scale).backward()
    return loss.detach().float(), model.linear.weight.grad.double() / scale


@pytest.mark.parametrize("name", BY_HAND)
def test_it_is_near_float32(name):
    exact, gradient = trained(ByHand(name), 1.0)
    for policy, scale, unit_of in (("fp16", 128.0, torch.float16), ("bf16", 1.0, torch.bfloat16)):
        loss, got = trained(dt.cast(ByHand(name), policy), scale)
        eps = torch.finfo(unit_of).eps
        torch.testing.assert_close(loss, exact, rtol=8 * eps, atol=4 * eps)
        assert (got - gradient).norm() <= 12 * eps * gradient.norm() + 1e-6, policy
