"""Two comparisons of one task beside each other: two machines, or two versions of a library.

Seconds and bytes are compared as they are, and speed against each one's own baseline, which the machines' own speeds
drop out of. What may account for a difference is listed: environment, plan and pace.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

from duotone.compare.report import words
from duotone.compare.report.markdown import table
from duotone.compare.report.report import ArmResult, Report
from duotone.errors import CompareError


@dataclass(frozen=True)
class ArmDifference:
    """One arm that both comparisons have.

    Attributes:
        name: of the arm.
        first: its result in the first comparison.
        second: its result in the second.
        step_ratio: seconds of the second's step over the first's; None where one is missing, as below.
        times_faster_ratio: the second's ratio to its own baseline over the first's.
        memory_ratio: the second's peak over the first's.
        worse_by: how much worse the second's quality is; negative where it is better.
    """

    name: str
    first: ArmResult
    second: ArmResult
    step_ratio: float | None
    times_faster_ratio: float | None
    memory_ratio: float | None
    worse_by: float | None


@dataclass(frozen=True)
class Changed:
    """Something that the comparisons were made with, and not in the same way.

    Attributes:
        name: what it is.
        first: its value in the first comparison; empty if it is not there.
        second: its value in the second.
    """

    name: str
    first: str
    second: str


@dataclass(frozen=True)
class Difference:
    """Two comparisons of one task.

    Attributes:
        task: its name.
        quality: the figure that stands for quality.
        arms: those in both, in the first one's order.
        changed: environment, plan and pace, where they differ.
        only_first: names of arms that the second does not have.
        only_second: names of arms that the first does not have.
        remarks: which figures are not comparable, and why.
    """

    task: str
    quality: str
    arms: tuple[ArmDifference, ...]
    changed: tuple[Changed, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    remarks: tuple[str, ...]


def difference(first: Report, second: Report) -> Difference:
    """Return what two comparisons of the same task differ in.

    Raises:
        CompareError: they are of different tasks, or judge them by different figures.
    """
    ours, theirs = first.subject, second.subject
    if (ours.name, ours.quality, ours.lower_is_better) != (theirs.name, theirs.quality, theirs.lower_is_better):
        raise CompareError(
            f"the comparisons are of {ours.name} by {ours.quality} and of {theirs.name} by {theirs.quality}; "
            "show two of the same task"
        )
    befores, afters = ({arm.name: arm for arm in report.arms} for report in (first, second))
    changed = tuple(_changed(_circumstances(first), _circumstances(second)))
    return Difference(
        task=ours.name,
        quality=ours.quality,
        arms=tuple(_arm(arm, afters[name], first) for name, arm in befores.items() if name in afters),
        changed=changed,
        only_first=tuple(name for name in befores if name not in afters),
        only_second=tuple(name for name in afters if name not in befores),
        remarks=tuple(_remarks(first, second, {change.name for change in changed})),
    )


def difference_markdown(difference: Difference, names: tuple[str, str]) -> str:
    """Return two comparisons as a Markdown table for each figure, ending in a line break.

    Args:
        difference: of them.
        names: what to call the first and the second.
    """
    parts = [
        f"# {difference.task}: {names[0]} and {names[1]}",
        *_tables(difference, names),
        *(f"Only in {name}: {words.listed(only)}" for name, only in _only(difference, names) if only),
        "\n".join(f"- {remark}" for remark in difference.remarks),
        _changed_table(difference, names),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _arm(before: ArmResult, after: ArmResult, report: Report) -> ArmDifference:
    worse_by = None
    if before.quality is not None and after.quality is not None:
        sign = 1 if report.subject.lower_is_better else -1
        worse_by = sign * (after.quality.value - before.quality.value)
    speeds = [arm.times_faster.value if arm.times_faster is not None else None for arm in (before, after)]
    steps = [arm.step_seconds.value if arm.step_seconds is not None else None for arm in (before, after)]
    return ArmDifference(
        name=before.name,
        first=before,
        second=after,
        step_ratio=_ratio(*steps),
        times_faster_ratio=_ratio(*speeds),
        memory_ratio=_ratio(before.peak_memory_bytes, after.peak_memory_bytes),
        worse_by=worse_by,
    )


def _ratio(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None or before == 0 else after / before


def _circumstances(report: Report) -> dict[str, str]:
    """Return all that a comparison was made with, arms apart, as names and words."""
    subject, plan = report.subject, dict(vars(report.plan))
    settings = dict(plan.pop("settings"))
    # the environment has the device; the arms are told apart, the steps are the pace's, and how long it was to take
    # changes no figure
    settings.pop("device", None)
    for name in ("arms", "steps", "minutes", "profile"):
        del plan[name]
    pace = {} if report.pace is None else asdict(report.pace)
    trained = {"parameters": subject.parameters, "micro_batch": subject.micro_batch, **subject.facts}
    return {name: str(value) for name, value in {**report.environment, **trained, **plan, **pace, **settings}.items()}


def _changed(first: Mapping[str, str], second: Mapping[str, str]) -> Iterator[Changed]:
    for name in dict.fromkeys([*first, *second]):
        before, after = first.get(name, ""), second.get(name, "")
        if before != after:
            yield Changed(name, before, after)


def _remarks(first: Report, second: Report, changed: set[str]) -> Iterator[str]:
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


def _only(difference: Difference, names: tuple[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield names[0], difference.only_first
    yield names[1], difference.only_second


def _tables(difference: Difference, names: tuple[str, str]) -> Iterator[str]:
    def of_both(
        title: str, text: Callable[[ArmResult], str], head: str, compared: Callable[[ArmDifference], str]
    ) -> str:
        rows = [[f"`{row.name}`", text(row.first), text(row.second), compared(row)] for row in difference.arms]
        rows = [row for row in rows if row[1] or row[2]]
        return f"## {title}\n\n{table(['arm', *names, head], rows)}" if rows else ""

    ratio = "second over first"
    yield of_both("Seconds of a step", _step, ratio, lambda row: _or_empty(row.step_ratio, words.ratio))
    yield of_both(
        "Times faster than its baseline", _speed, ratio, lambda row: _or_empty(row.times_faster_ratio, words.ratio)
    )
    yield of_both("Peak memory", _peak, ratio, lambda row: _or_empty(row.memory_ratio, words.ratio))
    yield of_both(difference.quality, _quality, "the second is", lambda row: _or_empty(row.worse_by, words.worse))
    yield of_both(
        "Verdicts", _verdict, "the same", lambda row: "yes" if _verdict(row.first) == _verdict(row.second) else "no"
    )


def _or_empty(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def _step(arm: ArmResult) -> str:
    return "" if arm.step_seconds is None else words.spread(arm.step_seconds, words.seconds)


def _speed(arm: ArmResult) -> str:
    return "" if arm.times_faster is None else words.spread(arm.times_faster, words.ratio)


def _peak(arm: ArmResult) -> str:
    return _or_empty(arm.peak_memory_bytes, words.size)


def _quality(arm: ArmResult) -> str:
    return "" if arm.quality is None else words.spread(arm.quality, words.quality)


def _verdict(arm: ArmResult) -> str:
    return arm.quality_verdict if arm.failure is None else arm.failure.kind


def _changed_table(difference: Difference, names: tuple[str, str]) -> str:
    if not difference.changed:
        return ""
    rows = [[change.name, change.first, change.second] for change in difference.changed]
    return f"## What else differs\n\n{table(['', *names], rows)}"
