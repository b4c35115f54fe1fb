"""What each arm costs: seconds by phase, bytes by role, and the largest micro-batch that fits."""

from duotone.compare.report import words
from duotone.compare.report.charts.bars import Row, bar_drawing
from duotone.compare.report.charts.drawing import Chart, Key
from duotone.compare.report.columns import Table, fit_table, memory_table, phase_table
from duotone.compare.report.report import ArmResult, Report

_PHASE_COLOURS = ("part-2", "part-1", "part-3")
_ROLE_COLOURS = ("part-1", "part-2", "part-3", "part-4", "part-5", "part-6")


def phase_chart(report: Report) -> Chart | None:
    """Return the chart of time per step by phase, or None if no arm took a step."""
    table = phase_table(report)
    *_, step = table.columns
    rows = [Row(arm.name, arm.group, _parts(table, arm, _PHASE_COLOURS), step.figure(arm)) for arm in table.arms]
    return _chart("phases", "median of a step", table, rows, _PHASE_COLOURS)


def memory_chart(report: Report) -> Chart | None:
    """Return the chart of memory by role with the measured peaks, or None if nothing of it is known."""
    table = memory_table(report)
    *_, peak = table.columns
    rows = []
    for arm in table.arms:
        parts, mark = _parts(table, arm, _ROLE_COLOURS), peak.number(arm)
        figure = f"{words.size(sum(parts))} in all" if mark is None else f"{peak.figure(arm)} at the peak"
        rows.append(Row(arm.name, arm.group, parts, figure, mark))
    return _chart("memory", "counted from the tensors", table, rows, _ROLE_COLOURS)


def fit_chart(report: Report) -> Chart | None:
    """Return the chart of the largest micro-batches, or None if they were not looked for."""
    table, unit = fit_table(report), report.subject.unit
    rows = []
    for arm in table.arms:
        samples, rate, _ = (column.figure(arm) for column in table.columns)
        size = arm.fit.micro_batch if arm.fit is not None else 0
        figure = f"{words.counted(size, 'sample')}, {rate} {unit}/s" if size else samples
        rows.append(Row(arm.name, arm.group, (float(size),), figure))
    return _chart("fit", "and throughput with it", table, rows, ("part-1",))


def _parts(table: Table, arm: ArmResult, colours: tuple[str, ...]) -> tuple[float, ...]:
    """Return the lengths of a bar's parts, one for each colour; none if all are 0."""
    parts = tuple(float(column.number(arm) or 0) for column, _ in zip(table.columns, colours, strict=False))
    return parts if any(parts) else ()


def _chart(name: str, unit: str, table: Table, rows: list[Row], colours: tuple[str, ...]) -> Chart | None:
    if not rows:
        return None
    # a part that no arm has needs no key, and a bar of one part no legend
    parts = zip(table.columns, colours, strict=False) if len(colours) > 1 else ()
    named = [(column.name, colour) for column, colour in parts if any(column.number(arm) for arm in table.arms)]
    keys = [Key(part, "area", colour) for part, colour in named]
    if any(row.mark is not None for row in rows):
        keys.append(Key("measured peak", "bar", "mark"))
    svg = bar_drawing(rows, colours, name, table.title)
    return Chart(name, table.title, unit, svg, tuple(keys), table.header, table.rows)
