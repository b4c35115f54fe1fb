"""A report as Markdown: verdicts, tables, rules, and how to repeat it. README takes its tables from here too."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from duotone.compare.records import Fit
from duotone.compare.report import words
from duotone.compare.report.report import ArmResult, Report

Cell = Callable[[ArmResult, Report], str]


def _if_known(value: object, text: Callable[..., str]) -> str:
    return "" if value is None else text(value)


def _quality(arm: ArmResult, report: Report) -> str:
    return _if_known(arm.quality, lambda figure: words.spread(figure, words.quality))


def _verdict(arm: ArmResult, report: Report) -> str:
    if arm.failure is not None:
        return arm.failure.kind
    return "baseline" if arm.name == report.plan.baseline else arm.quality_verdict


def _times_faster(arm: ArmResult, report: Report) -> str:
    if arm.name == report.plan.baseline:
        return words.ratio(1.0)
    return _if_known(arm.times_faster, lambda figure: words.spread(figure, words.ratio))


# each column by its key: its head, which may name the task's own words, and its cells
_COLUMNS: Mapping[str, tuple[str, Cell]] = MappingProxyType(
    {
        "arm": ("arm", lambda arm, report: f"`{arm.name}`"),
        "summary": ("how it trains", lambda arm, report: arm.summary),
        "milliseconds": (
            "ms per step",
            lambda arm, report: _if_known(arm.step_seconds, lambda step: words.milliseconds(step.value)),
        ),
        "throughput": (
            "{unit} per second",
            lambda arm, report: _if_known(arm.units_per_second, lambda rate: words.count(float(f"{rate:.3g}"))),
        ),
        "times_faster": ("times faster", _times_faster),
        "peak_memory": ("peak memory", lambda arm, report: _if_known(arm.peak_memory_bytes, words.size)),
        "memory_ratio": ("memory against the baseline", lambda arm, report: _if_known(arm.memory_ratio, words.ratio)),
        "bytes_per_parameter": (
            "bytes per parameter",
            lambda arm, report: f"{arm.bytes_per_parameter:.3g}" if arm.bytes_per_parameter else "",
        ),
        "quality": ("{quality}", _quality),
        "verdict": ("verdict", _verdict),
        "skipped": ("skipped", lambda arm, report: _if_known(arm.skipped, words.count)),
    }
)

ARM_COLUMNS = (
    "arm", "milliseconds", "times_faster", "peak_memory", "memory_ratio", "bytes_per_parameter", "quality", "verdict",
    "skipped",
)  # fmt: skip


def markdown(report: Report) -> str:
    """Return the whole report, ending in a line break."""
    subject = report.subject
    better = "lower" if subject.lower_is_better else "higher"
    about = {
        "parameters": words.count(subject.parameters),
        "quality": f"{subject.quality}, {better} is better",
        **subject.facts,
        **{f"{subject.quality} of {name}": words.quality(value) for name, value in subject.baselines.items()},
    }
    fits = [arm.fit for arm in report.arms if arm.fit is not None]
    parts = [
        f"# {subject.name} under {words.counted(len(report.arms), 'arm')}",
        _section("Verdicts", _items(report.verdicts)),
        _section("Arms", arm_table(report)),
        _section("Largest micro-batches", _fit_table(fits, subject.unit) if fits else ""),
        _section("Seconds of a step, by part", _phase_table(report)),
        _section("Memory by role", _memory_table(report)),
        _section("How it was judged", _items(report.rules)),
        _section("To know", _items([*report.remarks, *_notes(report)])),
        _section("What was trained", _pairs(about)),
        _section("Environment", _pairs(report.environment)),
        _section("To repeat it", "\n".join(["```bash", *report.commands, "```"])),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def arm_table(report: Report, columns: Sequence[str] = ARM_COLUMNS) -> str:
    """Return the table of arms, without a line break at its end.

    A cell is empty where nothing is known. Ranges are of a confidence interval for `times_faster`, and from the
    smallest to the largest seed for `quality`.

    Args:
        report: whose arms they are.
        columns: some of `arm`, `summary`, `milliseconds`, `throughput`, `times_faster`, `peak_memory`,
            `memory_ratio`, `bytes_per_parameter`, `quality`, `verdict` and `skipped`, in the order wanted.

    Raises:
        KeyError: there is no such column.
    """
    chosen = [_COLUMNS[name] for name in columns]
    heads = [head.format(unit=report.subject.unit, quality=report.subject.quality) for head, _ in chosen]
    return table(heads, ([cell(arm, report) for _, cell in chosen] for arm in report.arms))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table: the first column to the left, the others to the right.

    >>> print(table(["arm", "ms"], [["fp32", "12"], ["a|b", ""]]))
    | arm | ms |
    |---|--:|
    | fp32 | 12 |
    | a\\|b | |
    """
    lines = [_row(heads), "|---|" + "--:|" * (len(heads) - 1), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell.replace('|', chr(92) + '|')} |" if cell else " |" for cell in cells)


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _items(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _pairs(lines: Mapping[str, str]) -> str:
    return _items(f"{name}: {value}" for name, value in lines.items())


def _notes(report: Report) -> Iterator[str]:
    for arm in report.arms:
        yield from (f"{arm.name}: {note}" for note in arm.notes)


def _phase_table(report: Report) -> str:
    names = ("step", "forward", "backward", "update")
    rows = [
        [f"`{arm.name}`", *(words.seconds(getattr(arm.phases, name)) for name in names)]
        for arm in report.arms
        if arm.phases is not None
    ]
    return table(["arm", *names], rows) if rows else ""


def _memory_table(report: Report) -> str:
    roles = list(dict.fromkeys(role for arm in report.arms for role in arm.memory))
    rows = [
        [f"`{arm.name}`", *(words.size(arm.memory.get(role, 0)) for role in roles), words.size(arm.saved_bytes)]
        for arm in report.arms
        if arm.memory
    ]
    return table(["arm", *roles, "saved for backward"], rows) if rows else ""


def _fit_table(fits: Sequence[Fit], unit: str) -> str:
    rows = []
    for fit in fits:
        if fit.failure is not None:
            rows.append([f"`{fit.arm}`", fit.failure.kind, "", ""])
            continue
        peak = _if_known(fit.peak_memory_bytes, words.size)
        rows.append([f"`{fit.arm}`", words.count(fit.micro_batch), peak, words.rate(fit.units_per_second, unit)])
    heads = ["arm", f"samples that fit into {words.size(fits[0].limit_bytes)}", "peak memory", "throughput"]
    return table(heads, rows)
