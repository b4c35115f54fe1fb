"""What a run reports: a line of metrics for each logged step, and a summary at the end."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from duotone.wording.memory import Memory


@dataclass(frozen=True)
class Metrics:
    """One line of a run's metrics, named as in `metrics.jsonl`.

    Attributes:
        step: optimizer steps so far, skipped ones included.
        loss: mean training loss since the last line, over all ranks.
        quality: the task's quality on held-out data if it was evaluated at this step, else None.
        lr: learning rate of this step.
        loss_scale: factor of this step's gradients.
        skipped: steps skipped so far.
        grad_norm: of this step's true gradient before clipping; None if the step was skipped.
        units_per_second: what the task counts, on all ranks together, without evaluation and checkpoints.
        peak_memory_bytes: the device's peak allocation; on a CPU the peak resident set of the process, None on
            systems that do not report it. The largest of all ranks.
    """

    step: int
    loss: float
    quality: float | None
    lr: float
    loss_scale: float
    skipped: int
    grad_norm: float | None
    units_per_second: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
        step: optimizer steps, skipped ones included.
        skipped: steps skipped.
        seconds: spent in training steps by this process, without evaluation and checkpoints; of a resumed run, since
            it was resumed.
        units_per_second: over those seconds, on all ranks together.
        evaluation: every figure of the task's evaluation at the end.
        memory: bytes by role, on this rank.
        compile_seconds: spent in compiling by this process, which is in none of the seconds above.
    """

    step: int
    skipped: int
    seconds: float
    units_per_second: float
    evaluation: Mapping[str, float]
    memory: Memory
    compile_seconds: float = 0.0


def as_json(summary: Summary) -> dict[str, Any]:
    """Return a summary as JSON values, bytes per parameter included; a figure that is Inf or NaN is None."""
    evaluation = {name: value if math.isfinite(value) else None for name, value in summary.evaluation.items()}
    return {**asdict(summary), "evaluation": evaluation, "bytes_per_parameter": summary.memory.bytes_per_parameter}
