"""Recurrence: an LSTM over packed sequences that counts, and a GRU that continues a wave with a cell."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

TOKENS = 12


class LSTM(nn.Module):
    """Two bidirectional layers over an embedding with padding."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(4 * width, 3)

    def forward(self, token: Tensor, length: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.tokens(token), length, batch_first=True, enforce_sorted=False)
        packed, (hidden, _) = self.lstm(packed)
        states, _ = pad_packed_sequence(packed, batch_first=True)
        return self.head(torch.cat([states.sum(1) / length[:, None], hidden[-2], hidden[-1]], dim=1))


class GRU(nn.Module):
    """A GRU reads a wave; a cell, begun at zeros, continues it step by step."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.reader = nn.GRU(1, width, batch_first=True)
        self.cell = nn.GRUCell(1 + width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, wave: Tensor, steps: int) -> Tensor:
        _, read = self.reader(wave[..., None])
        state = torch.zeros(wave.shape[0], self.cell.hidden_size, device=wave.device)
        value, values = wave[:, -1:], []
        for _ in range(steps):
            state = self.cell(torch.cat([value, read[-1]], dim=1), state)
            value = value + self.head(state)
            values.append(value)
        return torch.cat(values, dim=1)


def sentences(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw padded sequences, their lengths, and which of three kinds of tokens is the most frequent."""
    length = torch.randint(3, 13, (48,), generator=generator)
    kind = torch.randint(3, (48, 1), generator=generator)
    noise = torch.randint(3, (48, 12), generator=generator)
    drawn = torch.where(torch.rand(48, 12, generator=generator) < 0.6, kind, noise)
    token = 1 + drawn + 3 * torch.randint(3, (48, 12), generator=generator)
    return torch.where(torch.arange(12) < length[:, None], token, 0), length, kind[:, 0]


def name_kind(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of the kind."""
    token, length, kind = batch
    return F.cross_entropy(model(token, length), kind)


def waves(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw sines of several frequencies, in two parts."""
    frequency = 0.3 + 0.3 * torch.rand(48, 1, generator=generator)
    phase = 6.28 * torch.rand(48, 1, generator=generator)
    wave = torch.sin(frequency * torch.arange(18) + phase)
    return wave[:, :12], wave[:, 12:]


def continue_wave(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean squared error of the second part."""
    before, after = batch
    return F.mse_loss(model(before, steps=after.shape[1]), after)
