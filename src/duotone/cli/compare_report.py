"""How `duotone compare` shows what came of it in a terminal of 80 columns: tables, verdicts, and where the page is."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from duotone.compare import ArmDifference, ArmResult, Difference, Report, Spread
from duotone.compare.report import words


def show_report(report: Report, path: Path, console: Console) -> None:
    """Show a report, with the page's place at the end."""
    console.print(_arms(report))
    if any(arm.fit is not None for arm in report.arms):
        console.print(_fits(report))
    _list("Verdicts", report.verdicts, console)
    _list("To know", report.remarks, console)
    _list("Warned of", _notes(report), console)
    console.print(
        f"\npage, with charts and the rules of the verdicts: {path / 'report.html'}", soft_wrap=True, markup=False
    )


def show_difference(difference: Difference, names: tuple[str, str], console: Console) -> None:
    """Show two comparisons of a task beside each other, the first one's figures before the second's."""
    console.print(f"first: {names[0]}\nsecond: {names[1]}", soft_wrap=True, markup=False)
    for title, figures in (("speed", _speeds), ("memory and quality", _costs)):
        table = Table(title=f"{difference.task}: {title}", title_justify="left", box=SIMPLE_HEAD)
        head = (
            ("a step", "second", "ratio", "times\nfaster", "second")
            if figures is _speeds
            else ("peak\nmemory", "second", "ratio", difference.quality, "second")
        )
        table.add_column("arm", overflow="fold")
        for name in head:
            table.add_column(name, justify="right", overflow="fold")
        for row in difference.arms:
            table.add_row(Text(row.name), *figures(row))
        console.print(table)
    for name, only in (("first", difference.only_first), ("second", difference.only_second)):
        if only:
            console.print(f"only in the {name}: {', '.join(only)}", markup=False)
    changes = tuple(
        f"{change.name}: {change.first or 'none'}, then {change.second or 'none'}" for change in difference.changed
    )
    _list("To know", difference.remarks, console)
    _list("What else differs", changes, console)


def _speeds(row: ArmDifference) -> list[str]:
    first, second = row.first, row.second
    return [
        *(_text(arm.step_seconds, words.seconds) for arm in (first, second)),
        "" if row.step_ratio is None else words.ratio(row.step_ratio),
        *(_text(arm.times_faster, words.ratio) for arm in (first, second)),
    ]


def _costs(row: ArmDifference) -> list[str]:
    first, second = row.first, row.second
    return [
        *("" if arm.peak_memory_bytes is None else words.size(arm.peak_memory_bytes) for arm in (first, second)),
        "" if row.memory_ratio is None else words.ratio(row.memory_ratio),
        *(_text(arm.quality, words.quality) for arm in (first, second)),
    ]


def _arms(report: Report) -> Table:
    subject = report.subject
    caption = Text(f"{subject.quality}: {'lower' if subject.lower_is_better else 'higher'} is better")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("arm", no_wrap=True)
    quality = subject.quality.replace("_", "\n")
    for name in ("a step,\nms", "times\nfaster", "peak\nmemory", "of\nbase", "bytes a\nparam.", quality):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=9)
    for arm in report.arms:
        table.add_row(*_figures(arm), style="bold" if arm.group == "duotone" else None)
    return table


def _figures(arm: ArmResult) -> list[Text]:
    judged = arm.failure.kind if arm.failure is not None else arm.quality_verdict
    figures = [
        arm.name,
        _text(arm.step_seconds, words.milliseconds),
        _text(arm.times_faster, words.ratio),
        "" if arm.peak_memory_bytes is None else words.size(arm.peak_memory_bytes),
        "" if arm.memory_ratio is None else words.ratio(arm.memory_ratio),
        f"{arm.bytes_per_parameter:.3g}" if arm.bytes_per_parameter else "",
        _text(arm.quality, words.quality),
        "" if judged == "not tested" else judged,
    ]
    # not as markup: an arm's name may hold brackets
    return [Text(figure) for figure in figures]


def _fits(report: Report) -> Table:
    fits = [arm.fit for arm in report.arms if arm.fit is not None]
    table = Table(
        title=f"largest micro-batch in {words.size(fits[0].limit_bytes)}", title_justify="left", box=SIMPLE_HEAD
    )
    for name in ("arm", "samples", "peak memory", f"{report.subject.unit}/s"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for fit in fits:
        if fit.failure is not None:
            table.add_row(Text(fit.arm), Text(fit.failure.kind))
        else:
            peak = "" if fit.peak_memory_bytes is None else words.size(fit.peak_memory_bytes)
            table.add_row(Text(fit.arm), f"{fit.micro_batch:,}", peak, f"{fit.units_per_second:,.0f}")
    return table


def _notes(report: Report) -> list[str]:
    notes: dict[str, list[str]] = {}
    for arm in report.arms:
        for note in arm.notes:
            notes.setdefault(note, []).append(arm.name)
    return [f"{', '.join(names)}: {note}" for note, names in notes.items()]


def _text(figure: Spread | None, digits: Callable[[float], str]) -> str:
    return "" if figure is None else digits(figure.value)


def _list(title: str, lines: Sequence[str], console: Console) -> None:
    if not lines:
        return
    console.print(f"\n[bold]{title}[/bold]")
    table = Table.grid(padding=(0, 1))
    for line in lines:
        table.add_row("-", Text(line))
    console.print(table)
