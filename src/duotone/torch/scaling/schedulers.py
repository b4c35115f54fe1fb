"""Learning-rate schedulers that advance only if their optimizer did not skip the step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from duotone.errors import OptimizerError


class Schedule(NamedTuple):
    """A scheduler that was handed to a step.

    Attributes:
        scheduler: anything with a method `step()`.
        optimizer: the index of its optimizer among those of the step; None if it does not say which it belongs to.
    """

    scheduler: Any
    optimizer: int | None


def schedules_of(schedulers: Any, optimizers: Sequence[torch.optim.Optimizer]) -> list[Schedule]:
    """Return each scheduler with the optimizer whose learning rate it changes.

    Args:
        schedulers: one, a list or tuple of several, or None.
        optimizers: those of a step.

    Raises:
        OptimizerError: one belongs to an optimizer that is not among these, advances by a metric, or has no `step()`.
    """
    if schedulers is None:
        return []
    several = schedulers if isinstance(schedulers, list | tuple) else (schedulers,)
    return [Schedule(scheduler, _index_of_optimizer(scheduler, optimizers)) for scheduler in several]


def advance(schedules: Sequence[Schedule], skipped_each: Sequence[bool]) -> None:
    """Advance every scheduler whose optimizer stepped; one of no known optimizer only if none skipped.

    Args:
        schedules: as `schedules_of` returns them.
        skipped_each: for each optimizer of the step, whether it skipped.
    """
    for scheduler, optimizer in schedules:
        skipped = any(skipped_each) if optimizer is None else skipped_each[optimizer]
        if not skipped:
            scheduler.step()


def _index_of_optimizer(scheduler: Any, optimizers: Sequence[torch.optim.Optimizer]) -> int | None:
    name = type(scheduler).__name__
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise OptimizerError(f"{name} advances by a metric; call its step(metric) yourself")
    if not callable(getattr(scheduler, "step", None)):
        raise OptimizerError(f"a scheduler has a method step(), but {name} has none; give one, a list, or a tuple")
    own = getattr(scheduler, "optimizer", None)
    if own is None:
        return None
    for index, optimizer in enumerate(optimizers):
        # MasterWeights shares its groups with the optimizer in it, and one that prepare made with the one before
        if own is optimizer or own.param_groups is optimizer.param_groups:
            return index
    raise OptimizerError(
        f"this {name} changes the learning rate of an {type(own).__name__} that is not among the optimizers of this "
        "step; build it on one that is"
    )
