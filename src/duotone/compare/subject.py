"""What a comparison trains, as its task says it; the task itself is built in the processes that train."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """What was trained.

    Attributes:
        name: of the task.
        quality: the figure that stands for quality.
        lower_is_better: which way it improves.
        unit: what throughput counts.
        parameters: trainable elements.
        baselines: quality of reference methods.
        facts: about the data.
        task_steps: the task's own number of steps.
        task_warmup_steps: the task's own warm-up.
        micro_batch: samples in one.
    """

    name: str
    quality: str
    lower_is_better: bool
    unit: str
    parameters: int
    baselines: Mapping[str, float]
    facts: Mapping[str, str]
    task_steps: int
    task_warmup_steps: int
    micro_batch: int
