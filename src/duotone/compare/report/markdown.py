"""A report as Markdown: verdicts, tables, rules, and how to repeat it."""

from collections.abc import Iterable, Sequence

from duotone.compare.report import words
from duotone.compare.report.columns import Table, arm_columns, evaluation_table, fit_table, memory_table, phase_table
from duotone.compare.report.report import Report
from duotone.compare.report.sections import sections


def markdown(report: Report) -> str:
    """Return the whole report, ending in a line break.

    A cell is empty where nothing is known. Ranges are of a confidence interval for times faster, quartiles for times,
    and from the smallest to the largest seed for qualities.
    """
    tables = [
        Table("Arms", tuple(arm_columns(report).values()), report.arms),
        *(make(report) for make in (fit_table, phase_table, memory_table, evaluation_table)),
    ]
    parts = [
        f"# {report.subject.name} under {words.counted(len(report.arms), 'arm')}",
        _section("Verdicts", _items(report.verdicts)),
        *(_section(each.title, table(each.header, each.rows)) for each in tables if each.arms),
        _section("How it was judged", _items(report.rules)),
        _section("To know", _items(report.remarks)),
        *(_section(title, _items(f"{name}: {text}" for name, text in pairs)) for title, pairs in sections(report)),
        _section("To repeat it", "\n".join(["```bash", *report.commands, "```"])),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table: names to the left, figures to the right.

    >>> print(table(["arm", "ms"], [["fp32", "12"], ["a|b", ""]]))
    | arm | ms |
    |---|--:|
    | `fp32` | 12 |
    | `a\\|b` | |
    """
    named = ([f"`{name}`", *figures] for name, *figures in rows)
    return "\n".join([_row(header), "|---|" + "--:|" * (len(header) - 1), *map(_row, named)])


def _row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell.replace('|', chr(92) + '|')} |" if cell else " |" for cell in cells)


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _items(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
