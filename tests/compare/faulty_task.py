"""A task file whose BF16 models meet a fault at their third loss: which one, their seed decides."""

import os
import signal
from dataclasses import replace

import torch
from torch import Tensor, nn

from duotone.train import Task

FAULTS = ("raise", "die", "nan")


def task() -> Task:
    """Return the tiny task, with the fault."""
    # beside this file, where a task file finds its imports while it runs
    import tiny_task

    fault = FAULTS[torch.initial_seed() % len(FAULTS)]
    tiny = tiny_task.task()
    losses = 0

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal losses
        losses += 1
        computed = tiny.loss(model, x)
        if losses < 3 or next(model.parameters()).dtype != torch.bfloat16:
            return computed
        if fault == "raise":
            raise RuntimeError("the third loss\nis never computed")
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return computed * float("nan")

    return replace(tiny, name="faulty", loss=loss)
