"""Training losses: one line per arm, over steps and over time.

Few arms share a chart; many get one for each group, always beside the baseline. The frame is the baseline's: an arm
that does much worse leaves it upwards.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from duotone.compare.report import words
from duotone.compare.report.charts.drawing import (
    WIDTH_INCHES,
    Chart,
    Key,
    bare,
    drawing,
    new_figure,
    tidy_ticks,
    to_svg,
)
from duotone.compare.report.charts.groups import GROUPS
from duotone.compare.report.charts.palette import STAND_INS, LineStyle, line_styles
from duotone.compare.report.charts.thinning import Line, mean_line
from duotone.compare.report.report import ArmResult, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# arms in one chart; beyond, lines and their legend are hard to tell apart
SHARED = 6
_HEIGHT_INCHES = 2.9
_DIRECT_LABELS = 4
_DIRECT_LETTERS = 10
# before a label, and for each of its letters: what the widest of usual fonts takes
_LEAD_POINTS, _LETTER_POINTS = 23.0, 7.0


def loss_charts(report: Report) -> tuple[Chart, ...]:
    """Return the charts of training losses, in pairs: over steps, over time; none if nothing was trained."""
    trained = [arm for arm in report.arms if any(curve.losses for curve in arm.curves)]
    points = 180 if len(trained) <= SHARED else 110
    lines = {arm.name: mean_line(arm.curves, points) for arm in trained}
    ceiling = _ceiling(lines, report.plan.baseline)
    charts: list[Chart] = []
    for name, title, arms in _panels(trained, report.plan.baseline):
        for over in ("steps", "time"):
            charts.append(_chart(f"loss-{name}-{over}", title, over, arms, report.plan.baseline, lines, ceiling))
    return tuple(charts)


def _panels(arms: Sequence[ArmResult], baseline: str) -> Iterator[tuple[str, str, list[ArmResult]]]:
    if len(arms) <= SHARED:
        if arms:
            yield "all", "", list(arms)
        return
    for group, title in GROUPS.items():
        chosen = [arm for arm in arms if arm.group == group or arm.name == baseline]
        if any(arm.group == group for arm in chosen) and (len(chosen) > 1 or group == chosen[0].group):
            yield group, title, chosen


def _ceiling(lines: dict[str, Line], baseline: str) -> float:
    """Return the largest loss to show: the baseline's largest, or that of the arm in the middle without one."""
    largest = {name: max(line.values) for name, line in lines.items() if line.values}
    if not largest:
        return 1.0
    return largest.get(baseline, sorted(largest.values())[len(largest) // 2])


def _chart(
    name: str,
    panel: str,
    over: str,
    arms: Sequence[ArmResult],
    baseline: str,
    lines: dict[str, Line],
    ceiling: float,
) -> Chart:
    styles = line_styles(arms, baseline)
    scale, unit = (1.0, "step") if over == "steps" else _time_unit([lines[arm.name] for arm in arms])
    direct = len(arms) <= _DIRECT_LABELS and all(len(arm.name) <= _DIRECT_LETTERS for arm in arms)
    shown = [(arm.name, lines[arm.name], styles[arm.name]) for arm in arms]
    title = f"Training loss over {over}" + (f", {panel}" if panel else "")
    with drawing():
        figure = new_figure(_HEIGHT_INCHES)
        label_points = _LEAD_POINTS + max(len(arm.name) for arm in arms) * _LETTER_POINTS if direct else 4.0
        axes = figure.add_axes((0.1, 0.17, 0.9 - label_points / 72 / WIDTH_INCHES, 0.795))
        bare(axes, "bottom")
        axes.grid(axis="y")
        ends: list[tuple[float, str, LineStyle]] = []
        for arm_name, line, style in shown:
            end = _draw(axes, line, style, _factor(line, over, scale), with_range=len(arms) <= SHARED)
            if end is not None:
                ends.append((end, arm_name, style))
        lowest = min((min(line.lower) for _, line, _ in shown if line.lower), default=0.0)
        height = max(ceiling - lowest, abs(ceiling) * 0.01, 1e-9)
        axes.set_ylim(lowest - 0.05 * height, ceiling + 0.05 * height)
        ends_at = [line.steps[-1] * _factor(line, over, scale) for _, line, _ in shown if line.steps]
        axes.set_xlim(0, max(ends_at, default=0.0) or 1.0)
        axes.locator_params(axis="both", nbins=5)
        # no exponent apart from the labels
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(unit, loc="right")
        tidy_ticks(axes, words.count if over == "steps" else "{:g}".format)
        if direct:
            _label_ends(axes, ends, axes.get_position().width * WIDTH_INCHES * 72)
        svg = to_svg(figure, name, f"{title}: {', '.join(arm.name for arm in arms)}")
    keys = () if direct else tuple(_keys(shown, baseline))
    broken = [f"{name} at step {line.broke_at:,}" for name, line, _ in shown if line.broke_at is not None]
    if broken:
        keys = (*keys, Key(f"no longer finite: {words.listed(broken)}", "mark", "mark"))
    how = "; mean over seeds" if any(len(arm.curves) > 1 for arm in arms) else ""
    return Chart(name, title, f"loss, by {unit}{how}", svg, keys)


def _keys(shown: Sequence[tuple[str, Line, LineStyle]], baseline: str) -> Iterator[Key]:
    for name, _, style in shown:
        text = f"{name}, the baseline" if name == baseline else name
        yield Key(text, "line", style.colour, style.width, style.dashes)


def _time_unit(lines: Sequence[Line]) -> tuple[float, str]:
    longest = max((line.steps[-1] * line.step_seconds for line in lines if line.steps), default=0.0)
    if longest >= 2 * 3600:
        return 1 / 3600, "hours of training"
    return (1 / 60, "minutes of training") if longest >= 120 else (1.0, "seconds of training")


def _factor(line: Line, over: str, scale: float) -> float:
    """Return what a step is on the horizontal axis."""
    return scale if over == "steps" else line.step_seconds * scale


def _draw(axes: "Axes", line: Line, style: LineStyle, factor: float, with_range: bool) -> float | None:
    """Draw an arm's line, and return the value that it ends with, None if there is nothing to draw."""
    if not line.steps:
        if line.broke_at is not None:
            axes.plot([line.broke_at * factor], [0.97], transform=axes.get_xaxis_transform(), **_broken())
        return None
    places = [step * factor for step in line.steps]
    colour = STAND_INS[style.colour]
    if with_range and line.lower != line.upper:
        axes.fill_between(places, line.lower, line.upper, color=colour, alpha=0.16, linewidth=0.0)
    dashes = (0, style.dashes) if style.dashes else "solid"
    axes.plot(places, line.values, color=colour, linewidth=style.width, linestyle=dashes, solid_capstyle="round")
    if line.broke_at is not None:
        axes.plot([places[-1]], [line.values[-1]], **_broken())
    return line.values[-1]


def _broken() -> dict[str, Any]:
    return {"marker": "x", "color": STAND_INS["mark"], "markersize": 7.0, "markeredgewidth": 1.8, "zorder": 5}


def _label_ends(axes: "Axes", ends: list[tuple[float, str, LineStyle]], width_points: float) -> None:
    """Write names beside the ends of lines, moved apart where they would touch, each with a piece of its line."""
    bottom, top = axes.get_ylim()
    inches = _HEIGHT_INCHES * 0.795
    gap = 14.5 / 72 / inches
    heights = [min(max((end - bottom) / (top - bottom), 0.0), 1.0) for end, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda index: heights[index])
    places: dict[int, float] = {}
    floor = 0.02
    for index in order:
        places[index] = max(heights[index], floor)
        floor = places[index] + gap
    above = 0.98
    for index in reversed(order):
        places[index] = min(places[index], above)
        above = places[index] - gap
    for index, (_, name, style) in enumerate(ends):
        colour = STAND_INS[style.colour]
        leader = {"transform": axes.transAxes, "clip_on": False, "color": colour, "linewidth": max(style.width, 1.5)}
        dashes = (0, style.dashes) if style.dashes else "solid"
        axes.plot([1 + 4 / width_points, 1 + 18 / width_points], [places[index]] * 2, linestyle=dashes, **leader)
        start = 1 + _LEAD_POINTS / width_points
        axes.text(start, places[index], name, transform=axes.transAxes, va="center", ha="left")
