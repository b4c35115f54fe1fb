"""A small model with everything that tests of `full_precision` need, and what trains it."""

from typing import Any

import torch
from torch import Tensor, nn

import duotone.torch as dt

WITH_MASTERS = ["bf16", "fp16", "bf16,grad=float32; head: param=float32,compute=float32"]
POLICIES = [*WITH_MASTERS, "bf16-true,rounding=stochastic"]
TOKENS = torch.tensor([[0, 3, 1], [2, 4, 4]])


class Tagger(nn.Module):
    """Tied, frozen and integer parameters, buffers, norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.unembed = nn.Linear(4, 5, bias=False)
        self.unembed.weight = self.embed.weight
        self.table = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.hidden(self.frozen(self.embed(tokens))))
        return self.head(hidden).sum() + self.unembed(hidden).square().mean()


def tagger(policy: str) -> tuple[Tagger, Any, dt.LossScaler]:
    """Return a model with masters that no 16-bit weight holds, and what trains it."""
    model = dt.cast(Tagger(), policy)
    optimizer = dt.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, backend="reference")
    scaler = dt.LossScaler(policy.split(";", maxsplit=1)[0])
    train(model, optimizer, scaler)
    return model, optimizer, scaler


def train(model: nn.Module, optimizer: Any, scaler: dt.LossScaler) -> None:
    scaler.backward(model(TOKENS))
    scaler.step(optimizer)
    optimizer.zero_grad()


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return copies of the state dict, the masters and the optimizer's state."""
    found = {name: value.clone() for name, value in model.state_dict().items()}
    found |= {f"master of {name}": master for name, master in dt.master_weights(model, optimizer).items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index} {name}": value.clone() for name, value in state.items()}
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor], same_bits: Any) -> bool:
    return first.keys() == second.keys() and all(same_bits(value, second[name]) for name, value in first.items())
