"""The columns that figures of arms stand in, described once: for the page, Markdown, the terminal, `--diff` and charts.

A view chooses columns by their keys, and how much of a figure it has room for.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter

from duotone.compare.report import words
from duotone.compare.report.report import ArmResult, Report, Spread

Value = Spread | float | str | None


@dataclass(frozen=True)
class Column:
    """One figure of every arm.

    Attributes:
        name: what it is.
        value: an arm's figure, with a range or without, or a word in its place; None where there is none.
        digits: how a figure is written.
        short: its name in a terminal, broken into narrow lines.
    """

    name: str
    value: Callable[[ArmResult], Value]
    digits: Callable[[float], str] = words.count
    short: str = ""

    def number(self, arm: ArmResult) -> float | None:
        """Return an arm's figure as a number, or None where there is none."""
        value = self.value(arm)
        value = value.value if isinstance(value, Spread) else value
        return None if isinstance(value, str) else value

    def figure(self, arm: ArmResult) -> str:
        """Return what is written without the range; nothing where there is no figure."""
        value, number = self.value(arm), self.number(arm)
        return self.digits(number) if number is not None else value if isinstance(value, str) else ""

    def range(self, arm: ArmResult) -> str:
        """Return the range alone, as `1.66 to 1.79`; nothing where there is none."""
        value = self.value(arm)
        return words.range_of(value, self.digits) if isinstance(value, Spread) else ""

    def text(self, arm: ArmResult) -> str:
        """Return the figure with its range in brackets."""
        span = self.range(arm)
        return f"{self.figure(arm)} ({span})" if span else self.figure(arm)


@dataclass(frozen=True)
class Table:
    """Some columns of the arms for which one of them holds something.

    Attributes:
        title: what it shows.
        columns: in their order; the arm's name stands before them.
        arms: its rows.
    """

    title: str
    columns: tuple[Column, ...]
    arms: tuple[ArmResult, ...]

    @property
    def header(self) -> tuple[str, ...]:
        """What stands above the rows."""
        return ("arm", *(column.name for column in self.columns))

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """An arm's name and its figures, with their ranges."""
        return tuple((arm.name, *(column.text(arm) for column in self.columns)) for arm in self.arms)


def arm_columns(report: Report) -> Mapping[str, Column]:
    """Return what is shown of an arm at once, by its key."""
    baseline, subject = report.plan.baseline, report.subject

    def verdict(arm: ArmResult) -> str:
        if arm.failure is not None:
            return arm.failure.kind
        return "baseline" if arm.name == baseline else arm.quality_verdict

    def times_faster(arm: ArmResult) -> Value:
        return 1.0 if arm.name == baseline and arm.step_seconds is not None else arm.times_faster

    return {
        "step": Column("time per step", attrgetter("step_seconds"), words.seconds, "a\nstep"),
        "times_faster": Column("times faster", times_faster, words.ratio, "times\nfaster"),
        "throughput": Column(f"{subject.unit} per second", attrgetter("units_per_second"), words.rate),
        "peak_memory": Column("peak memory", attrgetter("peak_memory_bytes"), words.size, "peak\nmemory"),
        "memory_ratio": Column("memory against the baseline", attrgetter("memory_ratio"), words.ratio, "of\nbase"),
        "bytes_per_parameter": Column(
            "bytes per parameter", lambda arm: arm.bytes_per_parameter or None, words.plain, "bytes a\nparam."
        ),
        "quality": Column(subject.quality, attrgetter("quality"), words.quality, subject.quality.replace("_", "\n")),
        "verdict": Column(f"against {baseline}", verdict, short="verdict"),
        "skipped": Column("skipped steps", attrgetter("skipped")),
    }


def phase_table(report: Report) -> Table:
    """Return what the parts of a step take; the whole is the last column."""

    def part(name: str) -> Column:
        return Column(name, lambda arm: None if arm.phases is None else getattr(arm.phases, name), words.seconds)

    return _table("Time per step by phase", map(part, ("forward", "backward", "update", "step")), report)


def memory_table(report: Report) -> Table:
    """Return bytes by what they are for; the measured peak is the last column."""

    def role(name: str) -> Column:
        return Column(name, lambda arm: arm.memory.get(name), words.size)

    def peak_or_unknown(arm: ArmResult) -> Value:
        return "unknown" if arm.peak_memory_bytes is None and arm.memory else arm.peak_memory_bytes

    saved = Column("saved activations", lambda arm: arm.saved_bytes if arm.memory else None, words.size)
    roles = map(role, ("weights", "tails", "gradients", "moments", "other"))
    peak = Column("peak memory", peak_or_unknown, words.size)
    return _table("Memory by role", (*roles, saved, peak), report)


def fit_table(report: Report) -> Table:
    """Return the largest micro-batches that fit, and what they bring."""

    def samples(arm: ArmResult) -> Value:
        if arm.fit is None:
            return None
        return arm.fit.failure.kind if arm.fit.failure is not None else arm.fit.micro_batch or "not even one fits"

    def of_fit(name: str, attribute: str, digits: Callable[[float], str]) -> Column:
        return Column(
            name, lambda arm: getattr(arm.fit, attribute) or None if arm.fit and not arm.fit.failure else None, digits
        )

    columns = (
        Column("samples", samples),
        of_fit(f"{report.subject.unit} per second", "units_per_second", words.rate),
        of_fit("peak memory", "peak_memory_bytes", words.size),
    )
    limit = next((arm.fit.limit_bytes for arm in report.arms if arm.fit is not None), 0)
    return _table(f"Largest micro-batch in {words.size(limit)}", columns, report)


def evaluation_table(report: Report) -> Table:
    """Return every figure of the task's evaluation, the quality first; no row if the quality is the only one."""
    names = dict.fromkeys([report.subject.quality, *(name for arm in report.arms for name in arm.evaluation)])
    columns = [Column(name, lambda arm, name=name: arm.evaluation.get(name), words.quality) for name in names]
    return _table("Every figure of the evaluation", columns if len(columns) > 1 else (), report)


def _table(title: str, columns: Iterable[Column], report: Report) -> Table:
    chosen = tuple(columns)
    return Table(title, chosen, tuple(arm for arm in report.arms if any(column.figure(arm) for column in chosen)))
