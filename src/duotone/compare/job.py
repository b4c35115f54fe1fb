"""One job: an arm, a task, a seed and settings, all that a process must know to train.

It is sent to that process pickled. Opening it twice gives the same weights and the same batches.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from duotone.compare.arms.catalogue import Arm
from duotone.compare.plan import Pace, Plan
from duotone.train import RunSettings, Task, find_task, resolve_settings


@dataclass(frozen=True)
class Job:
    """What is trained, by which arm, and how.

    Attributes:
        arm: which it is.
        task: a built-in task's name, or the path of a task file.
        seed: of the model, the batches and anything else random.
        settings: run settings that go before the task's own.
    """

    arm: Arm
    task: str
    seed: int
    settings: Mapping[str, Any]

    def open(self) -> tuple[Task, RunSettings]:
        """Seed every generator that a task may draw from, and build the task.

        Raises:
            TaskError: there is no such task, it cannot be built, or a setting cannot be.

        >>> job = Job(Arm("fp32", "torch", "plain", "by_torch:fp32"), "stdlib-text:tiny", 0, {"steps": 3})
        >>> task, settings = job.open()
        >>> settings.steps, settings.warmup_steps
        (3, 5)
        """
        # a wrong setting is an error before the task's data are read
        resolve_settings(self.settings)
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)
        task = find_task(self.task)
        policy = {} if self.arm.policy is None else {"policy": self.arm.policy}
        return task, resolve_settings(task.settings, self.settings, policy, {"task": self.task, "seed": self.seed})


def job_of(plan: Plan, arm: Arm, seed: int, pace: Pace | None = None) -> Job:
    """Return an arm's job under a plan, at its pace once that is decided."""
    settings = dict(plan.settings)
    if pace is not None:
        settings |= {"steps": pace.steps, "warmup_steps": pace.warmup_steps}
    elif plan.steps is not None:
        settings["steps"] = plan.steps
    return Job(arm, plan.task, seed, settings)
