"""Makes a report of the records in a comparison's folder, however many of them there are yet."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from duotone.compare.arms.catalogue import Arm
from duotone.compare.folder import ComparisonFolder
from duotone.compare.plan import Plan
from duotone.compare.records import Failure, Fit, Phases, Run, Trial, median_phases
from duotone.compare.report import words
from duotone.compare.report.remarks import Evidence, is_complete, remarks
from duotone.compare.report.report import ArmResult, Curve, Report, Spread, Verdict
from duotone.compare.report.statistics import (
    judge_quality,
    mean_and_range,
    quartiles,
    timed,
    times_faster,
    turn_ratios,
)
from duotone.compare.report.verdicts import rules, verdicts
from duotone.compare.subject import Subject
from duotone.errors import CompareError


def assemble(folder: ComparisonFolder) -> Report:
    """Return what a comparison came to, from its records alone.

    Raises:
        CompareError: there is no comparison, it has not begun to measure, or a record cannot be read.
    """
    plan, subject = folder.plan(), folder.subject()
    if subject is None:
        raise CompareError(
            f"{folder.path} holds a plan and no measurement; go on with duotone compare --resume --out {folder.path}"
        )
    names, tried = [arm.name for arm in plan.arms], folder.trials()
    trials = {name: tried[name] for name in names if name in tried}
    ended = folder.runs()
    runs = {name: {seed: ended[name, seed] for seed in plan.seeds if (name, seed) in ended} for name in names}
    fits = folder.fits()
    records = [_Records(arm, trials.get(arm.name), runs[arm.name], fits.get(arm.name), plan.seeds) for arm in plan.arms]
    baseline = next(each for each in records if each.arm.name == plan.baseline)
    pace = folder.pace()
    together = pace is None or pace.together
    arms = tuple(_result(each, baseline, plan, subject, together=together) for each in records)
    evidence = Evidence(plan, subject, pace, trials, runs, fits)
    show = ("duotone", "compare", "--show", str(folder.path))
    versions = {name: version for trial in trials.values() for name, version in trial.versions.items()}
    return Report(
        subject=subject,
        plan=plan,
        pace=pace,
        environment=folder.environment() | versions,
        arms=arms,
        verdicts=verdicts(subject, plan, arms),
        rules=rules(subject, plan),
        remarks=remarks(evidence),
        commands=tuple(shlex.join(argv) for argv in (plan.argv, show) if argv),
        is_complete=is_complete(evidence),
    )


@dataclass(frozen=True)
class _Records:
    """All that is known of one arm; its runs are in the order of the plan's seeds."""

    arm: Arm
    trial: Trial | None
    runs: Mapping[int, Run]
    fit: Fit | None
    seeds: Sequence[int]

    @property
    def finished(self) -> dict[int, Run]:
        return {seed: run for seed, run in self.runs.items() if run.failure is None}

    @property
    def turns(self) -> list[Phases]:
        return [turn for run in self.runs.values() for turn in timed(run.turns)]

    @property
    def peak(self) -> int | None:
        return self.trial.peak_memory_bytes if self.trial is not None else None

    def qualities(self, name: str) -> dict[int, float]:
        return {seed: run.evaluation.get(name, math.nan) for seed, run in self.finished.items()}


def _result(records: _Records, baseline: _Records, plan: Plan, subject: Subject, *, together: bool) -> ArmResult:
    arm, trial, finished = records.arm, records.trial or Trial(records.arm.name), records.finished
    is_baseline = records is baseline
    step, phases = _times(records)
    units = trial.units_per_step / step.value if step is not None and step.value > 0 and trial.units_per_step else None
    failure = _failure(records)
    worse_by, verdict = (None, "not tested") if is_baseline else _judged(records, baseline, plan, subject)
    evaluations = [run.evaluation for run in finished.values()]
    figures = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation))
    qualities = list(records.qualities(subject.quality).values())
    ratio = records.peak / baseline.peak if records.peak is not None and baseline.peak else None
    scales = [run.loss_scales[-1][1] for run in records.runs.values() if run.loss_scales]
    return ArmResult(
        name=arm.name,
        group=arm.group,
        summary=arm.summary,
        policy=arm.policy,
        failure=failure,
        seeds=len(finished),
        step_seconds=step,
        phases=phases,
        units_per_second=units,
        times_faster=None if is_baseline else _speed(records, baseline, plan.confidence, together=together),
        peak_memory_bytes=records.peak,
        memory_ratio=ratio,
        memory=trial.memory,
        saved_bytes=sum(trial.saved_bytes.values()),
        bytes_per_parameter=trial.bytes_per_parameter,
        quality=mean_and_range(qualities) if qualities else None,
        evaluation={name: mean_and_range([each[name] for each in evaluations if name in each]) for name in figures},
        worse_by=worse_by,
        quality_verdict=verdict,
        skipped=statistics.fmean(len(run.skipped) for run in finished.values()) if finished else None,
        loss_scale=scales[0] if scales else None,
        curves=tuple(_curve(run) for run in records.runs.values()),
        fit=records.fit,
        notes=_notes(records, trial),
    )


def _times(records: _Records) -> tuple[Spread | None, Phases | None]:
    turns = records.turns
    if not turns and records.trial is not None and records.trial.phases is not None:
        turns = [records.trial.phases]
    if not turns:
        return None, None
    return quartiles([turn.step for turn in turns]), median_phases(turns)


def _speed(records: _Records, baseline: _Records, confidence: float, *, together: bool) -> Spread | None:
    shared = [seed for seed, run in records.runs.items() if seed in baseline.runs]
    if together:
        # rounds of another session are other rounds
        shared = [seed for seed in shared if records.runs[seed].session == baseline.runs[seed].session]
    ratios = {seed: turn_ratios(baseline.runs[seed].turns, records.runs[seed].turns) for seed in sorted(shared)}
    return times_faster(ratios, confidence)


def _judged(records: _Records, baseline: _Records, plan: Plan, subject: Subject) -> tuple[Spread | None, Verdict]:
    theirs, ours = baseline.qualities(subject.quality), records.qualities(subject.quality)
    failures = [run.failure for run in records.runs.values()]
    failures += [records.trial.failure] if records.trial is not None else []
    # an end without a finite loss is a result, and no missing one
    if any(failure is not None and failure.kind == "not finite" for failure in failures):
        ours = {**ours, -1: math.nan}
    return judge_quality(theirs, ours, plan, lower_is_better=subject.lower_is_better)


def _failure(records: _Records) -> Failure | None:
    """Return why an arm has no result or only a part of one, with the seeds where it happened."""
    if records.trial is not None and records.trial.failure is not None:
        return records.trial.failure
    failed = {seed: run.failure for seed, run in records.runs.items() if run.failure is not None}
    if not failed:
        return None
    first = next(iter(failed.values()))
    seeds = [str(seed) for seed, failure in failed.items() if failure.kind == first.kind]
    if len(records.seeds) == 1:
        return first
    too = f"; seed{'' if len(seeds) == 2 else 's'} {words.listed(seeds[1:])} too" if len(seeds) > 1 else ""
    return Failure(first.kind, f"{first.reason} (seed {seeds[0]}{too})")


def _curve(run: Run) -> Curve:
    losses = run.losses
    if run.failure is not None and run.failure.kind == "not finite":
        # records hold finite means alone
        losses = (*losses, (run.steps, math.nan))
    turns = timed(run.turns)
    step_seconds = statistics.median(turn.step for turn in turns) if turns else 0.0
    return Curve(run.seed, losses, run.loss_scales, run.skipped, step_seconds)


def _notes(records: _Records, trial: Trial) -> tuple[str, ...]:
    of_runs = (note for run in records.runs.values() for note in run.notes)
    of_fit = [records.fit.remark] if records.fit is not None and records.fit.remark else []
    seconds = trial.compile_seconds
    compiling = [f"compiling took {words.seconds(seconds)} in the trial, which is in no step's time"] if seconds else []
    return tuple(dict.fromkeys([*compiling, *trial.notes, *of_runs, *of_fit]))
