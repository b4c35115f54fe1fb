"""A comparison's result as one value: what tables, charts, the page and the JSON file all show.

Every figure in it comes from records of measurements, and every verdict has its rule beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from duotone.compare.arms.catalogue import Group
from duotone.compare.plan import Pace, Plan
from duotone.compare.records import Failure, Fit, Phases
from duotone.compare.subject import Subject

Verdict = Literal["no worse", "worse", "undecided", "not tested"]


@dataclass(frozen=True)
class Spread:
    """A figure with its range.

    Attributes:
        value: the figure.
        lower: the lower end.
        upper: the upper end.
    """

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Curve:
    """What happened over the steps of one run.

    Attributes:
        seed: of the run.
        losses: pairs of a step and the mean training loss since the pair before.
        loss_scales: pairs of a step and the scale from there on.
        skipped: the steps that were skipped.
        step_seconds: the run's median, to draw losses over time.
    """

    seed: int
    losses: tuple[tuple[int, float], ...]
    loss_scales: tuple[tuple[int, float], ...]
    skipped: tuple[int, ...]
    step_seconds: float


@dataclass(frozen=True)
class ArmResult:
    """What one arm came to.

    Attributes:
        name: of the arm.
        group: of the arm.
        summary: how it trains, in a few words.
        policy: its text where Duotone trains, else None.
        failure: why it has no result, or only a part of one; else None. Figures that were obtained before stand.
        seeds: how many runs were finished.
        step_seconds: median over all turns with its quartiles, of failed runs too; from the trial if there are none;
            None without any.
        phases: medians over all turns, from the trial likewise.
        units_per_second: the task's units in a median step.
        times_faster: than the baseline, with a confidence interval; None for the baseline, and without turns of both.
        peak_memory_bytes: of the trial.
        memory_ratio: peak over the baseline's peak; None where either is missing.
        memory: bytes by role: weights, tails, gradients, moments, other.
        saved_bytes: kept for the backward pass of a micro-batch, all dtypes together.
        bytes_per_parameter: weights, tails, gradients and moments.
        quality: mean over seeds, with the smallest and the largest; None without a finished run.
        evaluation: the same for every figure of the task's evaluation.
        worse_by: mean over seeds of how much worse than the baseline with the same seed (negative: better), with the
            confidence interval of the test; None for the baseline, and below two seeds. Lower and upper are those of
            the two one-sided bounds.
        quality_verdict: of the non-inferiority test.
        skipped: steps skipped, mean over seeds; None without a finished run.
        loss_scale: the last one, of the first seed; 1 where losses are not scaled.
        curves: one for each run, unfinished ones too.
        fit: the largest micro-batch, if it was looked for.
        notes: what was warned of, each once.
    """

    name: str
    group: Group
    summary: str
    policy: str | None
    failure: Failure | None
    seeds: int
    step_seconds: Spread | None
    phases: Phases | None
    units_per_second: float | None
    times_faster: Spread | None
    peak_memory_bytes: int | None
    memory_ratio: float | None
    memory: Mapping[str, int]
    saved_bytes: int
    bytes_per_parameter: float
    quality: Spread | None
    evaluation: Mapping[str, Spread]
    worse_by: Spread | None
    quality_verdict: Verdict
    skipped: float | None
    loss_scale: float | None
    curves: tuple[Curve, ...]
    fit: Fit | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Everything that a comparison came to.

    Attributes:
        subject: what was trained.
        plan: what was asked for.
        pace: what the trials let it be run at; None if it ended before.
        environment: device, cores, versions, date, one line each.
        arms: results in the plan's order.
        verdicts: sentences, the most important first.
        rules: how speeds, qualities and memory were judged, a sentence each.
        remarks: what a reader must know of this comparison: unfinished, one seed, evaluation not deterministic, ...
        commands: the one that was typed, if it is known, and the one that shows it again.
        is_complete: whether every run of the plan has ended.
    """

    subject: Subject
    plan: Plan
    pace: Pace | None
    environment: Mapping[str, str]
    arms: tuple[ArmResult, ...]
    verdicts: tuple[str, ...]
    rules: tuple[str, ...]
    remarks: tuple[str, ...]
    commands: tuple[str, ...]
    is_complete: bool

    @property
    def notes(self) -> dict[str, list[str]]:
        """What was warned of, each once, with the names of the arms that it is of."""
        notes = dict.fromkeys(note for arm in self.arms for note in arm.notes)
        return {note: [arm.name for arm in self.arms if note in arm.notes] for note in notes}

    @property
    def baseline(self) -> ArmResult:
        """The arm that the others are compared with."""
        return next(arm for arm in self.arms if arm.name == self.plan.baseline)
