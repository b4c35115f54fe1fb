"""The run's learning rates as a torch scheduler, so that every library's optimizer goes through the same ones.

The numbers are those of `duotone train`: linear warm-up, `peak * (t + 1) / (warmup + 1)` for `t < warmup`, then
`peak * (f + (1 - f) * (1 + cos(pi * (t - warmup) / (steps - warmup))) / 2)`.
"""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from duotone.train import RunSettings


def cosine_schedule(optimizer: torch.optim.Optimizer, settings: RunSettings) -> LambdaLR:
    """Return the schedule of an optimizer whose learning rate is the peak; it is at step 0.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> settings = RunSettings(learning_rate=1.0, warmup_steps=1, steps=3, final_lr_fraction=0.0)
    >>> schedule = cosine_schedule(optimizer, settings)
    >>> schedule.get_last_lr()
    [0.5]
    """
    warmup = settings.warmup_steps
    cosine_steps = max(1, settings.steps - warmup)

    def fraction(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        position = min((step - warmup) / cosine_steps, 1.0)
        final = settings.final_lr_fraction
        return final + (1.0 - final) * (1.0 + math.cos(math.pi * position)) / 2

    return LambdaLR(optimizer, fraction)
