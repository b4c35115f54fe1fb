"""A few steps that an arm took in a row, and what each came to."""

from dataclasses import dataclass

from duotone.compare.records import Failure, Phases, median_phases


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        phases: its seconds.
        units: what the task counts, in its batches.
        loss: the mean over its micro-batches.
        loss_scale: that its gradients carried; 1 where losses are not scaled.
        skipped: whether the update was left out.
    """

    phases: Phases
    units: float
    loss: float
    loss_scale: float = 1.0
    skipped: bool = False


@dataclass(frozen=True)
class Turn:
    """Steps in a row.

    Attributes:
        steps: those that were taken to their ends.
        seconds: of them all, without compiling.
        failure: what ended the turn before its last step, or None.
        compile_seconds: of compiling, within the steps' own times.
    """

    steps: tuple[Step, ...]
    seconds: float = 0.0
    failure: Failure | None = None
    compile_seconds: float = 0.0

    @property
    def loss(self) -> float:
        """The mean over its steps; 0 without any."""
        return sum(step.loss for step in self.steps) / len(self.steps) if self.steps else 0.0

    @property
    def phases(self) -> Phases:
        """Medians over its steps, the first apart unless it is the only one: it finds the caches in another's use."""
        return median_phases([step.phases for step in self.steps[1:] or self.steps])
