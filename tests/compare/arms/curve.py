"""A task that trains in milliseconds, and an arm put to it as a comparison does: without dropout, so arms are equal."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from duotone.compare.arms.build import build
from duotone.compare.arms.catalogue import CATALOGUE, Arm
from duotone.compare.arms.stepper import Assignment, Stepper, Update
from duotone.train import RunSettings, Task
from duotone.train.task import evaluating

CPU = torch.device("cpu")


class Curve(nn.Module):
    """Predicts, or returns the loss if it is given what to predict; one of its weights is large enough for 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
        self.outputs = 1

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        predicted = self.layers(x)
        return predicted if target is None else (predicted.float() - target).square().mean()

    def shape(self) -> tuple[int, int]:
        return 8, self.outputs


def curve_task(outlier: int | None = None) -> Task:
    """Return a regression; the batch of that index is so large that FP16 gradients overflow, but not the loss."""

    def loss(model: Any, x: Tensor) -> Tensor:
        assert model.shape() == (8, 1)
        assert next(model.parameters()).device == x.device
        return model(x, target=x.square().mean(1, keepdim=True))

    def batches(generator: torch.Generator) -> Iterator[Tensor]:
        for index in range(1000):
            yield (torch.rand(16, 8, generator=generator) * 2 - 1) * (30 if index == outlier else 1)

    def evaluate(model: nn.Module) -> dict[str, float]:
        x = torch.linspace(-1, 1, 256).reshape(32, 8)
        with evaluating(model):
            return {"loss": (model(x).float() - x.square().mean(1, keepdim=True)).square().mean().item()}

    return Task(name="curve", model=Curve(), loss=loss, batches=batches, evaluate=evaluate)


def curve_settings(**changes: Any) -> RunSettings:
    defaults = {"learning_rate": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.01}
    return RunSettings(**{**defaults, "steps": 6, "warmup_steps": 2, "micro_batches": 2, "seed": 5, **changes})


def assign(arm: str | Arm, outlier: int | None = None, **changes: Any) -> Assignment:
    """Return a fresh task for an arm; the model is always the same."""
    torch.manual_seed(5)
    arm = CATALOGUE[arm] if isinstance(arm, str) else arm
    return Assignment(arm, curve_task(outlier), curve_settings(**changes), CPU)


def batches_of(assignment: Assignment) -> Iterator[Tensor]:
    """Return the batches that a run draws."""
    return iter(assignment.task.batches(torch.Generator().manual_seed(assignment.settings.seed * 2**32)))


def train(assignment: Assignment, steps: int, then: Callable[[Update], None] = lambda update: None) -> Stepper:
    """Return an arm's stepper after so many steps; `then` is called after each."""
    stepper, batches = build(assignment), batches_of(assignment)
    for _ in range(steps):
        for _ in range(assignment.settings.micro_batches):
            stepper.backward(stepper.forward(next(batches)))
        then(stepper.update())
    return stepper


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's weights, by the names that the task gave them."""
    return {name.partition("layers.")[2]: weight.detach().clone() for name, weight in model.named_parameters()}
