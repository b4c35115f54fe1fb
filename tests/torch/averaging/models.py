"""A small model with everything that an average meets, a step of it, and averages by hand."""

import numpy as np
import torch
from torch import Tensor, nn

import duotone.torch as dt


class Small(nn.Module):
    """A tied weight, a frozen part, a norm with running statistics, a parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.frozen(self.norm(self.embed(tokens))))


def small(policy: str | None, seed: int = 0) -> Small:
    torch.manual_seed(seed)
    model = Small()
    return model if policy is None else dt.cast(model, policy)


def backward(model: nn.Module, seed: int, scaler: dt.LossScaler | None = None, factor: float = 1.0) -> None:
    """Run a backward pass; with a factor of Inf no gradient is finite."""
    tokens = torch.randint(11, (16,), generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(model(tokens).float(), tokens) * factor
    if scaler is None:
        loss.backward()
    else:
        scaler.backward(loss)


class ByHand:
    """The exponential average of masters in NumPy: the first update takes them as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._share = model, np.float32(1.0 - decay)
        self.averages = self._masters()
        self.updates = 0

    def _masters(self) -> dict[str, np.ndarray]:
        return {name: master.numpy() for name, master in dt.master_weights(self._model).items()}

    def update(self) -> None:
        for name, master in self._masters().items():
            before = self.averages[name]
            self.averages[name] = master if self.updates == 0 else before + (master - before) * self._share
        self.updates += 1


def bits(state: object) -> object:
    """Return tensors in nested dicts and lists as their bytes, so that == compares bits."""
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, Tensor):
        return str(state.dtype), state.detach().cpu().numpy().tobytes() if state.dtype != torch.bfloat16 else (
            state.detach().view(torch.int16).numpy().tobytes()
        )
    return state
