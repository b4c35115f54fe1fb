"""Trains an architecture in FP32, under torch.amp and under Duotone, on one batch: as many updates in each."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import duotone.torch as dt

UPDATES = 24
# the loss at the end is the mean of the last few
LAST = 4
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Architecture:
    """A public architecture with random weights, tiny.

    Attributes:
        build: makes the model.
        batch: makes what is handed to it, by name.
        loss: takes the model and the batch; by default the model returns its loss.
        learning_rate: of AdamW.
        tolerances: by policy, what is allowed instead of `FALL`, with `reason`.
        reason: why.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    loss: Callable[[nn.Module, dict[str, Any]], Tensor] = lambda model, batch: model(**batch).loss
    learning_rate: float = 1e-3
    tolerances: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Run:
    """What came of it.

    Attributes:
        first: the loss before the first update.
        fall: how far it fell.
        skipped: steps that were skipped before the first update, and later.
    """

    first: float
    fall: float
    skipped: int


class Start:
    """One model and batch, from which every run starts."""

    def __init__(self, architecture: Architecture) -> None:
        torch.manual_seed(0)
        self._architecture = architecture
        self._model = architecture.build().train()
        self._batch = architecture.batch()

    def run(self, arm: str) -> Run:
        """Train in an arm: `fp32`, `torch.amp bf16`, `torch.amp fp16`, or a policy of Duotone's."""
        model = copy.deepcopy(self._model)
        step = _by_torch(model, arm, self) if arm.startswith(("fp32", "torch.amp")) else _by_duotone(model, arm, self)
        losses, skipped = [], 0
        while len(losses) < UPDATES:
            # what is drawn at a step, masks and noise, is the same in every arm
            torch.manual_seed(len(losses))
            loss, is_skipped = step()
            skipped += is_skipped
            if skipped > UPDATES:
                raise AssertionError(f"{arm} skips every step")
            if not is_skipped:
                losses.append(loss)
        return Run(losses[0], losses[0] - sum(losses[-LAST:]) / LAST, skipped)

    def loss(self, model: nn.Module) -> Tensor:
        return self._architecture.loss(model, copy.deepcopy(self._batch))

    @property
    def learning_rate(self) -> float:
        return self._architecture.learning_rate


Step = Callable[[], tuple[float, bool]]


def _by_torch(model: nn.Module, arm: str, start: Start) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=start.learning_rate)
    dtype = _DTYPES.get(arm.removeprefix("torch.amp "))
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)

    def step() -> tuple[float, bool]:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = start.loss(model)
        before = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.item(), scaler.get_scale() < before

    return step


def _by_duotone(model: nn.Module, policy: str, start: Start) -> Step:
    dt.cast(model, policy)
    optimizer, scaler = dt.AdamW(model.parameters(), lr=start.learning_rate), dt.LossScaler(policy)

    def step() -> tuple[float, bool]:
        optimizer.zero_grad()
        loss = start.loss(model)
        scaler.backward(loss)
        return loss.item(), bool(scaler.step(optimizer, clip_norm=1.0).skipped)

    return step
