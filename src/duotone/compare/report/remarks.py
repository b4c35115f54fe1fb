"""What limits the meaning of one comparison's figures, or of two beside each other, and whether one is complete."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from duotone.compare.plan import Pace, Plan
from duotone.compare.records import Fit, Run, Trial
from duotone.compare.report import words
from duotone.compare.report.report import Report
from duotone.compare.report.statistics import range_confidence, turn_ratios
from duotone.compare.subject import Subject

# below this, workspaces and pages outweigh weights and activations
_SMALL_BYTES = 50_000_000


@dataclass(frozen=True)
class Evidence:
    """All that was measured.

    Attributes:
        plan: what was asked for.
        subject: what was trained.
        pace: what the runs were run at, if it is decided.
        trials: by arm.
        runs: by arm and seed; every arm of the plan has an entry.
        fits: by arm.
    """

    plan: Plan
    subject: Subject
    pace: Pace | None
    trials: Mapping[str, Trial]
    runs: Mapping[str, Mapping[int, Run]]
    fits: Mapping[str, Fit]


def is_complete(evidence: Evidence) -> bool:
    """Return whether every arm was tried, and every run of those that could be run has ended."""
    return len(evidence.trials) == len(evidence.plan.arms) and not _runs_left(evidence)


def remarks(evidence: Evidence) -> tuple[str, ...]:
    """Return the remarks, a sentence each."""
    return tuple(
        remark
        for part in (_left, _few, _short, _alone, _apart, _small, _not_deterministic, _other_versions)
        for remark in part(evidence)
    )


def _able(evidence: Evidence) -> list[str]:
    """Return the arms that have no reason not to be run, those that were not tried yet among them."""
    trials = evidence.trials
    names = [arm.name for arm in evidence.plan.arms]
    return [name for name in names if name not in trials or trials[name].failure is None]


def _runs_left(evidence: Evidence) -> int:
    return sum(seed not in evidence.runs[name] for name in _able(evidence) for seed in evidence.plan.seeds)


def _left(evidence: Evidence) -> Iterator[str]:
    plan = evidence.plan
    untried = len(plan.arms) - len(evidence.trials)
    if untried:
        yield f"the comparison is not finished: {untried} of {words.counted(len(plan.arms), 'arm')} are not tried yet"
    elif left := _runs_left(evidence):
        runs = words.counted(len(_able(evidence)) * len(plan.seeds), "run")
        yield f"the comparison is not finished: {left} of {runs} have not ended yet"
    elif plan.fit_memory_bytes is not None:
        missing = [name for name in _able(evidence) if name not in evidence.fits]
        if missing:
            yield f"the largest micro-batch of {words.listed(missing)} is not found yet"


def _few(evidence: Evidence) -> Iterator[str]:
    plan = evidence.plan
    if len(plan.arms) == 1:
        yield f"{plan.arms[0].name} is the only arm, and has nothing to be compared with"
        return
    if len(plan.seeds) == 1:
        yield "there is one seed: qualities cannot be tested, and differences may be chance"
    elif len(plan.seeds) == 2:
        yield "with two seeds, only large or very regular differences of quality can be distinguished from chance"
    rounds = [count for name in evidence.runs if name != plan.baseline and (count := _rounds(evidence, name))]
    if not rounds:
        return
    if min(rounds) == 1:
        yield "speeds come from a single round: nothing is known of how far they can be relied on"
    elif range_confidence(min(rounds)) < plan.confidence:
        yield (
            f"speeds come from {min(rounds)} rounds: their interval is all of the range, which holds the median with "
            f"{words.percent(round(range_confidence(min(rounds)), 3))} confidence, not {words.percent(plan.confidence)}"
        )


def _rounds(evidence: Evidence, name: str) -> int:
    baseline = evidence.runs[evidence.plan.baseline]
    runs = evidence.runs[name]
    return sum(len(turn_ratios(baseline[seed].turns, runs[seed].turns)) for seed in runs.keys() & baseline.keys())


def _short(evidence: Evidence) -> Iterator[str]:
    pace, subject = evidence.pace, evidence.subject
    if pace is not None and pace.steps < subject.task_steps:
        text = f"runs have {pace.steps:,} of the task's own {words.counted(subject.task_steps, 'step')}"
        if pace.warmup_steps != subject.task_warmup_steps:
            text += f", and {pace.warmup_steps:,} of its {subject.task_warmup_steps:,} steps of warm-up"
        yield f"{text}; qualities are those of so short a training"


def _alone(evidence: Evidence) -> Iterator[str]:
    if evidence.pace is not None and not evidence.pace.together and len(evidence.plan.arms) > 1:
        yield (
            "arms ran one after the other, for they do not fit into memory together: what changed on the machine "
            "meanwhile is part of their speeds"
        )


def _apart(evidence: Evidence) -> Iterator[str]:
    if evidence.pace is None or not evidence.pace.together:
        return
    baseline = evidence.runs[evidence.plan.baseline]
    names = [
        name
        for name, runs in evidence.runs.items()
        if any(seed in baseline and run.session != baseline[seed].session for seed, run in runs.items())
    ]
    if names:
        yield (
            f"{words.listed(names)} ran at another time than {evidence.plan.baseline} with some seeds, after an "
            "interruption: those rounds have no part in how many times faster it is"
        )


def _small(evidence: Evidence) -> Iterator[str]:
    trial = evidence.trials.get(evidence.plan.baseline)
    peak = None if trial is None else trial.peak_memory_bytes
    if peak is not None and peak < _SMALL_BYTES:
        yield (
            f"{evidence.plan.baseline} takes {words.size(peak)} at its peak: of so small a model it is mostly what "
            "single operations need for themselves, so ratios of memory tell nothing of larger ones"
        )


def _not_deterministic(evidence: Evidence) -> Iterator[str]:
    names = [name for name, trial in evidence.trials.items() if trial.failure is None and not trial.is_deterministic]
    if names:
        yield (
            f"evaluating {words.listed(names)} twice gave two results: the task's evaluation is not deterministic, "
            "and a part of the differences in quality is its own"
        )


def _other_versions(evidence: Evidence) -> Iterator[str]:
    by_library: dict[str, dict[str, None]] = {}
    for trial in evidence.trials.values():
        for library, version in trial.versions.items():
            by_library.setdefault(library, {})[version] = None
    for library, versions in by_library.items():
        if len(versions) > 1:
            yield f"{library} changed its version between trials: {words.listed(list(versions))}"


def difference_remarks(first: Report, second: Report, changed: Set[str]) -> Iterator[str]:
    """Yield which figures of two comparisons cannot be compared, by the names of what differs between them."""
    subject = first.subject
    trained = {*subject.facts, *second.subject.facts, "parameters", "micro_batch"}
    training = {"steps", "warmup_steps", "seeds", *first.plan.settings, *second.plan.settings}
    if reasons := sorted(changed & (trained | training)):
        yield f"{words.listed(reasons)} differ: qualities are not comparable between the two"
    if reasons := sorted(changed & (trained | {"micro_batches"})):
        yield f"{words.listed(reasons)} differ: a step is not the same work in both"
    if "baseline" in changed:
        yield "the baselines differ: how many times faster an arm is does not mean the same in both"
    if changed & {"margin", "confidence"}:
        yield "margin or confidence differ: the verdicts on quality have different rules"
    for number, report in (("first", first), ("second", second)):
        if not report.is_complete:
            yield f"the {number} comparison is not finished"
