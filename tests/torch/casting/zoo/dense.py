"""A multi-layer perceptron with dropout, on classes that another network drew."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Three linear layers, GELU and dropout."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(8, width)
        self.middle = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up(x))
        x = x + self.drop(F.gelu(self.middle(x)))
        return self.head(x)


def points(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw points in 8 dimensions and their classes by a fixed random map."""
    teacher = torch.randn(8, 4, generator=Generator().manual_seed(1))
    x = torch.randn(128, 8, generator=generator)
    return x, torch.tanh(x @ teacher).argmax(1)


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of one model's logits."""
    x, label = batch
    return F.cross_entropy(model(x), label)
