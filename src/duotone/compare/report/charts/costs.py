"""What each arm costs: seconds by phase, bytes by role, and the largest micro-batch that fits."""

from collections.abc import Sequence

from duotone.compare.report import words
from duotone.compare.report.charts.bars import Row, bar_drawing
from duotone.compare.report.charts.drawing import Chart, Key
from duotone.compare.report.report import ArmResult, Report

_PHASES = ("forward", "backward", "update")
_PHASE_COLOURS = ("part-2", "part-1", "part-3")
_ROLES = ("weights", "tails", "gradients", "moments", "other", "saved activations")
_ROLE_COLOURS = ("part-1", "part-2", "part-3", "part-4", "part-5", "part-6")


def phase_chart(report: Report) -> Chart | None:
    """Return the chart of time per step by phase, or None if no arm took a step."""
    timed = [(arm, arm.phases) for arm in report.arms if arm.phases is not None]
    if not timed:
        return None
    rows, table = [], []
    for arm, phases in timed:
        parts = (phases.forward, phases.backward, phases.update)
        rows.append(Row(arm.name, arm.group, parts, words.seconds(phases.step)))
        table.append((arm.name, *map(words.seconds, parts), words.seconds(phases.step)))
    title = "Time per step by phase"
    return Chart(
        name="phases",
        title=title,
        unit="median of a step",
        svg=bar_drawing(rows, _PHASE_COLOURS, "phases", title),
        keys=tuple(Key(phase, "area", colour) for phase, colour in zip(_PHASES, _PHASE_COLOURS, strict=True)),
        header=("arm", *_PHASES, "step"),
        rows=tuple(table),
    )


def memory_chart(report: Report) -> Chart | None:
    """Return the chart of memory by role with the measured peaks, or None if nothing of it is known."""
    known = [arm for arm in report.arms if _memory(arm) or arm.peak_memory_bytes is not None]
    if not known:
        return None
    rows, table = [], []
    for arm in known:
        parts = _memory(arm)
        peak = arm.peak_memory_bytes
        figure = f"{words.size(sum(parts))} in all" if peak is None else f"{words.size(peak)} at the peak"
        rows.append(Row(arm.name, arm.group, parts, figure, None if peak is None else float(peak)))
        sizes = map(words.size, parts) if parts else ("",) * len(_ROLES)
        table.append((arm.name, *sizes, "unknown" if peak is None else words.size(peak)))
    shown = [any(row.parts and row.parts[index] for row in rows) for index in range(len(_ROLES))]
    pairs = zip(_ROLES, _ROLE_COLOURS, shown, strict=True)
    keys = [Key(role, "area", colour) for role, colour, is_shown in pairs if is_shown]
    if any(row.mark is not None for row in rows):
        keys.append(Key("measured peak", "bar", "mark"))
    title = "Memory by role"
    return Chart(
        name="memory",
        title=title,
        unit="counted from the tensors",
        svg=bar_drawing(rows, _ROLE_COLOURS, "memory", title),
        keys=tuple(keys),
        header=("arm", *_ROLES, "peak"),
        rows=tuple(table),
    )


def fit_chart(report: Report) -> Chart | None:
    """Return the chart of the largest micro-batches, or None if they were not looked for."""
    searched = [(arm, arm.fit) for arm in report.arms if arm.fit is not None]
    if not searched:
        return None
    rows, table = [], []
    for arm, fit in searched:
        if fit.failure is not None:
            figure, speed = fit.failure.kind, ""
        elif fit.micro_batch:
            speed = words.rate(fit.units_per_second, report.subject.unit)
            figure = f"{words.counted(fit.micro_batch, 'sample')}, {speed}"
        else:
            figure, speed = "not even one fits", ""
        rows.append(Row(arm.name, arm.group, (float(fit.micro_batch),), figure))
        peak = "" if fit.peak_memory_bytes is None else words.size(fit.peak_memory_bytes)
        table.append((arm.name, str(fit.micro_batch) if fit.micro_batch else figure, speed, peak))
    title = f"Largest micro-batch in {words.size(searched[0][1].limit_bytes)}"
    return Chart(
        name="fit",
        title=title,
        unit="and throughput with it",
        svg=bar_drawing(rows, ("part-1",), "fit", title),
        header=("arm", "samples", "throughput", "peak"),
        rows=tuple(table),
    )


def _memory(arm: ArmResult) -> tuple[float, ...]:
    sizes: Sequence[float] = [float(arm.memory.get(role, 0)) for role in _ROLES[:-1]]
    parts = (*sizes, float(arm.saved_bytes))
    return parts if any(parts) else ()
