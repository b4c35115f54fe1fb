"""Two comparisons of one task beside each other: two machines, or two versions of a library.

Seconds and bytes are compared as they are, speeds each against its own baseline, which cancels the machines' own
speeds. What may account for a difference is listed: environment, plan and pace.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from duotone.compare.report.columns import arm_columns
from duotone.compare.report.remarks import difference_remarks
from duotone.compare.report.report import ArmResult, Report
from duotone.errors import CompareError


@dataclass(frozen=True)
class ArmDifference:
    """One arm that both comparisons have.

    Attributes:
        first: its result in the first comparison.
        second: its result in the second.
        changes: by a column's key, the second's figure over the first's; for "quality", how much worse the second is
            (negative: better). Columns that lack a figure are left out.
    """

    first: ArmResult
    second: ArmResult
    changes: Mapping[str, float]


@dataclass(frozen=True)
class Difference:
    """Two comparisons of one task.

    Attributes:
        first: the first report.
        arms: those in both, in the first one's order.
        only_first: names of arms that the second does not have.
        only_second: names of arms that the first does not have.
        circumstances: environment, plan and pace where they differ: by name, the first's value and the second's,
            empty where there is none.
        remarks: which figures are not comparable, and why.
    """

    first: Report
    arms: tuple[ArmDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    circumstances: Mapping[str, tuple[str, str]]
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
    before, after = ({arm.name: arm for arm in report.arms} for report in (first, second))
    both = [(arm, after[name]) for name, arm in before.items() if name in after]
    one, other = _circumstances(first), _circumstances(second)
    pairs = {name: (one.get(name, ""), other.get(name, "")) for name in {**one, **other}}
    circumstances = {name: (value, later) for name, (value, later) in pairs.items() if value != later}
    return Difference(
        first=first,
        arms=tuple(ArmDifference(*pair, _changes(*pair, first)) for pair in both),
        only_first=tuple(name for name in before if name not in after),
        only_second=tuple(name for name in after if name not in before),
        circumstances=circumstances,
        remarks=tuple(difference_remarks(first, second, circumstances.keys())),
    )


def _changes(before: ArmResult, after: ArmResult, report: Report) -> dict[str, float]:
    figures = {key: (column.number(before), column.number(after)) for key, column in arm_columns(report).items()}
    known = {key: (one, two) for key, (one, two) in figures.items() if one is not None and two is not None}
    sign = 1 if report.subject.lower_is_better else -1
    ratios = {key: two / one for key, (one, two) in known.items() if one and key != "quality"}
    return ratios | {key: sign * (two - one) for key, (one, two) in known.items() if key == "quality"}


def _circumstances(report: Report) -> dict[str, str]:
    """Return all that a comparison was made with, arms apart, as names and values."""
    subject, plan, settings = report.subject, dict(vars(report.plan)), dict(report.plan.settings)
    # the environment has the device and the pace the steps; what was typed and how long it may take change no figure
    settings.pop("device", None)
    for name in ("arms", "steps", "minutes", "profile", "argv", "settings"):
        del plan[name]
    pace = {} if report.pace is None else asdict(report.pace)
    trained = {"parameters": subject.parameters, "micro_batch": subject.micro_batch, **subject.facts}
    return {name: str(value) for name, value in {**report.environment, **trained, **plan, **pace, **settings}.items()}
