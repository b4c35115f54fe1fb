"""Byte-level language modelling of Python's standard library with a small GPT.

    loss = mean over bytes of -ln p(byte | the bytes before it in its window);  bits_per_byte = loss / ln 2

Nothing is downloaded: the text is the running interpreter's own (`corpus`), so figures under different Python
versions are close but not the same. Left out: tokenisation, and evaluation with overlapping windows, which
would help every model alike.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from duotone import corpus
from duotone.errors import TaskError, nearest_names
from duotone.train.task import Task, evaluating
from duotone.train.tasks.gpt import GPT, GPTConfig

EPOCH_BATCHES = 100


@dataclass(frozen=True)
class Size:
    """A model and how much it reads per batch and per evaluation, in windows of `model.context` bytes."""

    model: GPTConfig
    windows: int
    held_out_windows: int
    steps: int
    learning_rate: float
    warmup_steps: int

    @property
    def settings(self) -> Mapping[str, object]:
        """What a run of this size does best with; AdamW's betas and decay are those of GPT-3."""
        return {
            "optimizer": "adamw",
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "weight_decay": 0.1,
            "betas": (0.9, 0.95),
            "clip_norm": 1.0,
        }


# small and base have heads 128 wide: a CPU's attention takes a third less time so than with the usual 64
SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "tiny": Size(GPTConfig(layers=1, heads=2, width=64, context=32), 8, 128, 50, 3e-3, 5),
        "small": Size(GPTConfig(layers=4, heads=2, width=256, context=128), 16, 512, 1400, 2e-3, 100),
        "base": Size(GPTConfig(layers=6, heads=3, width=384, context=256), 16, 256, 5000, 1e-3, 200),
        "medium": Size(GPTConfig(layers=12, heads=12, width=768, context=1024), 16, 64, 5000, 6e-4, 500),
    }
)


def stdlib_text(size: str = "small") -> Task:
    """Build the task: the corpus, its baselines and a fresh model.

    Raises:
        TaskError: if there is no such size, or no source of the standard library.

    >>> task = stdlib_text("tiny")
    >>> next(iter(task.batches(torch.Generator()))).shape
    torch.Size([8, 33])
    """
    if size not in SIZES:
        raise TaskError(f"stdlib-text has no size {size!r}; {nearest_names(size, SIZES)}")
    return text_task(f"stdlib-text:{size}", corpus.standard_library(), SIZES[size])


def text_task(name: str, text: corpus.Corpus, size: Size) -> Task:
    """Build the task of modelling any text; the first held-out bytes are the ones predicted.

    Raises:
        TaskError: if the text is shorter than one window, or its held-out part than one evaluation.
    """
    context = size.model.context
    judged = text.held_out[: size.held_out_windows * context + 1]
    for part, have, need in (
        ("train", len(text.train), context + 1),
        ("held-out", len(judged), size.held_out_windows * context + 1),
    ):
        if have < need:
            raise TaskError(f"task {name!r}: the {part} text has {have} bytes, {need} are needed; use a smaller size")
    train = torch.tensor(text.train)
    # one byte more than is predicted: window i is bytes i * context up to and including (i + 1) * context
    held_out = torch.tensor(judged).unfold(0, context + 1, context)

    def batches(generator: torch.Generator) -> Iterator[torch.Tensor]:
        for _ in range(EPOCH_BATCHES):
            starts = torch.randint(len(train) - context, (size.windows, 1), generator=generator)
            yield train[starts + torch.arange(context + 1)]

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        device = next(model.parameters()).device
        with evaluating(model):
            parts = held_out.split(size.windows)
            total = math.fsum(judged_loss(model, part.to(device)).item() * len(part) for part in parts)
        loss = total / len(held_out)
        return {"bits_per_byte": loss / math.log(2), "loss": loss}

    return Task(
        name=name,
        model=GPT(size.model),
        loss=window_loss,
        batches=batches,
        evaluate=evaluate,
        quality="bits_per_byte",
        unit="bytes",
        units_in=lambda windows: windows.shape[0] * (windows.shape[1] - 1),
        settings=size.settings,
        baselines={
            "unigram": corpus.unigram_bits(text.train, judged),
            "bigram": corpus.bigram_bits(text.train, judged),
            "xz -9 (reads no training text)": corpus.xz_bits(judged),
        },
        facts={**text.facts, "judged by": f"{len(judged) - 1:,} held-out bytes, each predicted once"},
    )


def window_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood, in nats, of each byte after the first in its window, as the model computes it.

    Args:
        model: a `GPT`, or what takes and returns the same.
        windows: bytes as uint8, shape (B, T + 1).
    """
    tokens = windows.long()
    return model(tokens[:, :-1], tokens[:, 1:])


def judged_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """The same from the model's logits, in FP32 whatever computes them, so that all precisions are judged alike."""
    tokens = windows.long()
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
