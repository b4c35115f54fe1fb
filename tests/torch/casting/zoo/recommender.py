"""A recommender after DLRM: bags of embeddings, their pairwise products, and times in FP64 that FP32 cannot tell."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

ROWS, FIELDS = 50, 3
# seconds since 1970: FP32 rounds them to two minutes
NOW = 1.7e9


class DLRM(nn.Module):
    """Bags of items and dense features, one vector each; their products go into the top."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.bags = nn.ModuleList([nn.EmbeddingBag(ROWS, width, mode=mode) for mode in ("sum", "mean", "sum")])
        self.bottom = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + FIELDS * (FIELDS + 1) // 2, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, seen: Tensor, now: Tensor, items: list[Tensor], offsets: list[Tensor]) -> Tensor:
        minutes = ((now - seen) / 60).float()
        bottom = self.bottom(torch.cat([dense, minutes[:, None].to(dense.dtype)], dim=1))
        bags = [bag(item, offset) for bag, item, offset in zip(self.bags, items, offsets, strict=True)]
        vectors = torch.stack([bottom, *bags], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        row, column = torch.tril_indices(FIELDS + 1, FIELDS + 1, offset=-1)
        return self.top(torch.cat([bottom, products[:, row, column]], dim=1)).squeeze(1)


def visits(generator: Generator) -> tuple[Tensor, ...]:
    """Draw dense features, times, bags of items, and whether a click follows."""
    dense = torch.randn(128, 4, generator=generator)
    minutes = 4 * torch.rand(128, generator=generator, dtype=torch.float64)
    taste = torch.randn(FIELDS, ROWS, generator=Generator().manual_seed(1))
    items = torch.randint(ROWS, (FIELDS, 128, 2), generator=generator)
    liking = sum(taste[field][items[field]].sum(1) for field in range(FIELDS))
    click = (3 * (minutes - 2) + 0.5 * liking + dense[:, 0] > 0).float()
    now = torch.full((128,), NOW, dtype=torch.float64)
    return dense, now - 60 * minutes, now, items.flatten(1), torch.arange(0, 256, 2), click


def click_through(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the cross entropy of clicks."""
    dense, seen, now, items, offsets, click = batch
    logits = model(dense, seen, now, items=list(items), offsets=[offsets] * FIELDS)
    return F.binary_cross_entropy_with_logits(logits, click)
