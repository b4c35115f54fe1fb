"""The learning rate: linear warm-up, then a cosine, as a scheduler of torch's that `scaler.step` holds on a skip.

`lr(t) = peak * (t + 1) / (warmup + 1)` for `t < warmup`, then
`lr(t) = peak * (f + (1 - f) * (1 + cos(pi * (t - warmup) / (steps - warmup))) / 2)`, with `f` the final fraction
(Loshchilov and Hutter, 1608.03983, without restarts). `t` counts the steps that were not skipped.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from duotone.errors import TaskError
from duotone.run_settings import RunSettings


def cosine_schedule(optimizer: torch.optim.Optimizer, settings: RunSettings) -> LambdaLR:
    """Return the schedule of an optimizer whose learning rate is the peak, at step 0.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> settings = RunSettings(learning_rate=1.0, warmup_steps=1, steps=3, final_lr_fraction=0.0)
    >>> cosine_schedule(optimizer, settings).get_last_lr()
    [0.5]
    """
    warmup, final = settings.warmup_steps, settings.final_lr_fraction
    cosine_steps = max(1, settings.steps - warmup)

    def fraction(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        position = min((step - warmup) / cosine_steps, 1.0)
        return final + (1.0 - final) * (1.0 + math.cos(math.pi * position)) / 2

    return LambdaLR(optimizer, fraction)


class SavedSchedule:
    """A schedule as checkpoints hold it; it also loads the step count that earlier checkpoints hold in its place.

    Args:
        schedule: to be saved or loaded, after its optimizer.
    """

    def __init__(self, schedule: LambdaLR) -> None:
        self._schedule = schedule

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's own state."""
        return self._schedule.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, or go to the step that an earlier checkpoint names."""
        schedule = self._schedule
        if "count" not in state_dict:
            _check_like(state_dict, schedule.state_dict())
            schedule.load_state_dict(dict(state_dict))
            return
        step = int(state_dict["count"])
        rates = [peak * fraction(step) for peak, fraction in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict(
            {**schedule.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        )
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            # the learning rate of an earlier checkpoint is a tensor
            group["lr"] = rate


def _check_like(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise unless a state has the names and types of the schedule's own: torch takes over whatever it is given."""
    wrong = [name for name in state.keys() | own.keys() if _form(state.get(name)) != _form(own.get(name))]
    if wrong:
        raise TaskError(f"a schedule's state has another {', '.join(sorted(wrong))}; use another checkpoint")


def _form(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_form(each) for each in value]
    return "number" if isinstance(value, int | float) else type(value)
