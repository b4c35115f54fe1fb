"""What a model's optimizer has to say of its loss scale, read between two steps of `fit`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras

from duotone.keras.internals import ops, values_in_fit
from duotone.keras.optim.loss_scale_optimizer import LossScaleOptimizer, StepReport


@dataclass(frozen=True)
class Reading:
    """Numbers on the host, after a step.

    Attributes:
        fields: those that go into logs.
        step: what the optimizer reports of the last step; None if it is no `LossScaleOptimizer` of Duotone's.
        iterations: steps that were taken.
    """

    fields: dict[str, float]
    step: StepReport | None = None
    iterations: int = 0


def read(model: Any) -> Reading:
    """Return what the model's optimizer says; it waits for the last step.

    Keras' own `LossScaleOptimizer` tells its scale alone, and an optimizer without a loss scale nothing.
    """
    optimizer = model.optimizer
    # TensorFlow's backend builds it in the first step
    if optimizer is None or not optimizer.built:
        return Reading({})
    with readable(model):
        if isinstance(optimizer, LossScaleOptimizer):
            report = optimizer.report()
            fields = {"loss_scale": report.loss_scale, "skipped": report.skipped, "grad_norm": report.grad_norm}
            return Reading(fields, report, number(optimizer.iterations))
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            return Reading({"loss_scale": number(optimizer.dynamic_scale)})
    return Reading({})


@contextmanager
def readable(model: Any) -> Iterator[None]:
    """Let the optimizer's own variables and its scalars be read between two steps of `fit`, on JAX too.

    What its inner optimizer keeps for each parameter stays where it is, so this costs the same for every model.
    """
    pairs = values_in_fit(model)
    if not pairs:
        yield
        return
    optimizer = model.optimizer
    inner = {id(each) for each in getattr(optimizer, "inner_optimizer", optimizer).variables}
    with keras.StatelessScope([(each, value) for each, value in pairs if not each.shape or id(each) not in inner]):
        yield


def number(variable: Any) -> Any:
    """Return the value of a scalar variable as a Python number."""
    return ops.convert_to_numpy(variable).item()
