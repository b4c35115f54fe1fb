"""Sums by index: graph convolutions on communities, and a mixture of experts that routes by a softmax."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

NODES, FEATURES = 120, 16


class GraphConvolution(nn.Module):
    """The mean of the neighbours' messages; their sum goes in place into zeros in FP32, or into a new tensor."""

    def __init__(self, inputs: int, outputs: int, in_place: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.in_place = in_place

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        nodes = x.size(0)
        degree = torch.zeros(nodes, device=x.device)
        degree.index_add_(0, target, torch.ones(target.numel(), device=x.device))
        message = self.linear(x)[source]
        if self.in_place:
            out = torch.zeros(nodes, message.size(1), device=x.device)
            out.index_add_(0, target, message)
        else:
            out = message.new_zeros(nodes, message.size(1)).index_add(0, target, message)
        return out / degree.clamp(min=1)[:, None]


class GCN(nn.Module):
    """Two graph convolutions and a head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = GraphConvolution(FEATURES, width, in_place=True)
        self.second = GraphConvolution(width, width, in_place=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = F.relu(self.first(x, edges))
        return self.head(F.relu(self.second(x, edges)))


class RMSNorm(nn.Module):
    """The norm of Llama, as it is written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Expert(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MixtureOfExperts(nn.Module):
    """The two likeliest of four experts for each token, and the loss that balances their load."""

    def __init__(self, width: int, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList([Expert(width) for _ in range(experts)])
        self.chosen = chosen

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probability = F.softmax(self.router(x), dim=-1, dtype=torch.float32)
        weight, index = probability.topk(self.chosen, dim=-1)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(index == number)
            share = weight.index_select(0, token).gather(1, place[:, None])
            out.index_add_(0, token, expert(x.index_select(0, token)) * share)
        load = F.one_hot(index, len(self.experts)).float().mean((0, 1))
        return out, len(self.experts) * (load * probability.mean(0)).sum()


class ExpertModel(nn.Module):
    """A residual layer of experts behind a hand-written norm."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.norm = RMSNorm(width)
        self.experts = MixtureOfExperts(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        out, balance = self.experts(self.norm(x))
        return self.head(x + out), balance


def communities(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a graph of three communities: noisy features, edges mostly inside, and the community of each node."""
    label = torch.arange(NODES) % 3
    source = torch.randint(NODES, (8 * NODES,), generator=generator)
    target = torch.randint(NODES, (8 * NODES,), generator=generator)
    inside = source // 3 * 3 + target % 3
    source = torch.where(torch.rand(8 * NODES, generator=generator) < 0.7, inside, source)
    centres = torch.randn(3, FEATURES, generator=Generator().manual_seed(1))
    features = centres[label] + 2 * torch.randn(NODES, FEATURES, generator=generator)
    return features, torch.stack([source, target]), label


def name_community(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of each node's community."""
    features, edges, label = batch
    return F.cross_entropy(model(features, edges), label)


def pieces(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw points and their images under one of four linear maps, by quadrant."""
    maps = torch.randn(4, 6, 2, generator=Generator().manual_seed(1))
    x = torch.randn(128, 6, generator=generator)
    quadrant = 2 * (x[:, 0] > 0) + (x[:, 1] > 0).long()
    return x, torch.einsum("ni,nio->no", x, maps[quadrant])


def fit_pieces(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean squared error and a little of the balancing loss."""
    x, y = batch
    out, balance = model(x)
    return F.mse_loss(out, y) + 0.01 * balance
