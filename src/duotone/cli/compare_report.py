"""How `duotone compare` shows what came of it in a terminal of 80 columns: tables, verdicts, and where the page is."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from duotone.compare import Difference, Report
from duotone.compare.report import words
from duotone.compare.report.columns import arm_columns, fit_table


def show_report(report: Report, path: Path, console: Console) -> None:
    """Show a report, with the page's place at the end."""
    console.print(_arms(report))
    if any(arm.fit is not None for arm in report.arms):
        console.print(_fits(report))
    _list("Verdicts", report.verdicts, console)
    _list("To know", report.remarks, console)
    _list("Warned of", [f"{', '.join(names)}: {note}" for note, names in report.notes.items()], console)
    console.print(
        f"\npage, with charts and the rules of the verdicts: {path / 'report.html'}", soft_wrap=True, markup=False
    )


def show_difference(difference: Difference, names: tuple[str, str], console: Console) -> None:
    """Show two comparisons of a task beside each other, the first one's figures before the second's."""
    console.print(f"first: {names[0]}\nsecond: {names[1]}", soft_wrap=True, markup=False)
    columns, subject = arm_columns(difference.first), difference.first.subject
    for title, keys in (("speed", ("step", "times_faster")), ("memory and quality", ("peak_memory", "quality"))):
        table = Table(title=f"{subject.name}: {title}", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("arm", overflow="fold")
        for key in keys:
            for name in (columns[key].short, "second", "change" if key == "quality" else "ratio"):
                table.add_column(name, justify="right", overflow="fold")
        for row in difference.arms:
            cells = [row.first.name]
            for key in keys:
                change, written = row.changes.get(key), words.worse if key == "quality" else words.ratio
                cells += [columns[key].figure(arm) for arm in (row.first, row.second)]
                cells.append("" if change is None else written(change))
            table.add_row(*map(Text, cells))
        console.print(table)
    for name, only in (("first", difference.only_first), ("second", difference.only_second)):
        if only:
            console.print(f"only in the {name}: {', '.join(only)}", markup=False)
    pairs = difference.circumstances.items()
    _list("To know", difference.remarks, console)
    _list(
        "What else differs", [f"{name}: {one or 'none'}, then {two or 'none'}" for name, (one, two) in pairs], console
    )


def _arms(report: Report) -> Table:
    subject = report.subject
    caption = Text(f"{subject.quality}: {'lower' if subject.lower_is_better else 'higher'} is better")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_justify="left")
    # those with a name for narrow tables
    columns = [column for column in arm_columns(report).values() if column.short]
    table.add_column("arm", no_wrap=True)
    for column in columns[:-1]:
        table.add_column(column.short, justify="right", no_wrap=True)
    table.add_column(columns[-1].short, min_width=9)
    for arm in report.arms:
        # not as markup: an arm's name may hold brackets
        cells = map(Text, (arm.name, *(column.figure(arm) for column in columns)))
        table.add_row(*cells, style="bold" if arm.group == "duotone" else None)
    return table


def _fits(report: Report) -> Table:
    fits = fit_table(report)
    table = Table(title=fits.title, title_justify="left", box=SIMPLE_HEAD)
    for name in fits.header:
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in fits.rows:
        table.add_row(*map(Text, row))
    return table


def _list(title: str, lines: Sequence[str], console: Console) -> None:
    if not lines:
        return
    console.print(f"\n[bold]{title}[/bold]")
    table = Table.grid(padding=(0, 1))
    for line in lines:
        table.add_row("-", Text(line))
    console.print(table)
