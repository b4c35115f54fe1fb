"""Loss scales: a strip for each arm that scales, over steps, with the steps that were skipped marked on it.

The axis is logarithmic and shared, for a scale is a power of two. The first seed is drawn strongly, the others faintly.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from duotone.compare.report import words
from duotone.compare.report.charts.drawing import Chart, Key, bare, drawing, new_figure, tidy_ticks, to_svg
from duotone.compare.report.charts.names import shortened
from duotone.compare.report.charts.palette import STAND_INS
from duotone.compare.report.report import ArmResult, Curve, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STRIP_INCHES, _FOOT_INCHES, _HEAD_INCHES = 1.0, 0.48, 0.36
# what few strips have in all, so that one alone is no ribbon
_LEAST_INCHES = 1.9
_NAME_LETTERS = 44
# marks of one strip; more of them would overlap
_MOST_MARKS = 80
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def scale_chart(report: Report) -> Chart | None:
    """Return the chart of loss scales, or None if no arm scales its losses."""
    arms = [arm for arm in report.arms if is_scaled(arm)]
    if not arms:
        return None
    title = "Loss scale over steps"
    strip_inches = max(_STRIP_INCHES, _LEAST_INCHES / len(arms))
    height = len(arms) * strip_inches + _FOOT_INCHES
    frame = _frame(arms)
    with drawing():
        figure = new_figure(height)
        for index, arm in enumerate(arms):
            bottom = height - (index + 1) * strip_inches
            top = bottom + strip_inches - _HEAD_INCHES
            axes = figure.add_axes((0.1, bottom / height, 0.885, (top - bottom) / height))
            _draw(axes, arm, frame)
            is_last = index + 1 == len(arms)
            tidy_ticks(axes, words.count if is_last else lambda _: "")
            if is_last:
                axes.set_xlabel("step", loc="right")
            name_at = (top + 0.1) / height
            figure.text(0.0, name_at, shortened(arm.name, _NAME_LETTERS), ha="left", va="baseline")
            figure.text(0.985, name_at, _count(arm), ha="right", va="baseline", color=STAND_INS["muted"])
        svg = to_svg(figure, "loss-scale", f"{title}: {', '.join(arm.name for arm in arms)}")
    keys = [Key("first seed", "line", "accent", 1.8)]
    if any(len(arm.curves) > 1 for arm in arms):
        keys.append(Key("other seeds", "line", "muted", 0.7))
    if any(arm.curves[0].skipped for arm in arms):
        keys.append(Key("skipped step", "mark", "mark"))
    return Chart("loss-scale", title, "powers of two", svg, tuple(keys))


def is_scaled(arm: ArmResult) -> bool:
    """Return whether an arm's losses are scaled: a scale other than 1 is in its curves."""
    return any(_is_shown(scale) and scale != 1.0 for curve in arm.curves for _, scale in curve.loss_scales)


def power_of_two(value: float) -> str:
    """Return a loss scale as it is written: a power of two, or a plain number where it is none.

    >>> power_of_two(65536.0), power_of_two(0.5), power_of_two(3.0)
    ('2¹⁶', '2⁻¹', '3')
    """
    exponent = math.log2(value) if _is_shown(value) else 0.5
    if not exponent.is_integer():
        return f"{value:g}"
    return "2" + f"{exponent:.0f}".translate(_RAISED)


def _is_shown(scale: float) -> bool:
    return math.isfinite(scale) and scale > 0


def _frame(arms: Sequence[ArmResult]) -> tuple[int, int, int]:
    """Return the last step, and the lowest and the highest exponent of all arms."""
    curves = [curve for arm in arms for curve in arm.curves]
    exponents = [math.log2(scale) for curve in curves for _, scale in curve.loss_scales if _is_shown(scale)]
    return max(map(_last_step, curves)), math.floor(min(exponents)), math.ceil(max(exponents))


def _last_step(curve: Curve) -> int:
    steps = [step for step, _ in (*curve.losses, *curve.loss_scales)]
    return max((*steps, *curve.skipped), default=1)


def _draw(axes: "Axes", arm: ArmResult, frame: tuple[int, int, int]) -> None:
    last, lowest, highest = frame
    bare(axes, "bottom")
    axes.set_xlim(0, last)
    axes.set_ylim(lowest - 0.5, highest + 0.5)
    ticks = range(lowest, highest + 1) if highest - lowest <= 2 else (lowest, highest)
    axes.set_yticks(ticks, [power_of_two(2.0**tick) for tick in ticks])
    axes.grid(axis="y")
    axes.locator_params(axis="x", nbins=5)
    first = arm.curves[0]
    # the first seed's last, so that it lies on top
    for curve in reversed(arm.curves):
        colour, width = ("accent", 1.8) if curve is first else ("muted", 0.7)
        axes.plot(*_stairs(curve), color=STAND_INS[colour], linewidth=width, drawstyle="steps-post")
    thinned = first.skipped[:: max(1, math.ceil(len(first.skipped) / _MOST_MARKS))]
    heights = [_exponent_at(first, step) for step in thinned]
    look = {"marker": "x", "markersize": 5.5, "markeredgewidth": 1.5, "color": STAND_INS["mark"]}
    axes.plot(thinned, heights, linestyle="none", zorder=4, clip_on=False, **look)


def _stairs(curve: Curve) -> tuple[list[int], list[float]]:
    """Return steps and exponents, up to the curve's last step."""
    shown = [(step, math.log2(scale)) for step, scale in curve.loss_scales if _is_shown(scale)]
    if shown:
        shown.append((max(_last_step(curve), shown[-1][0]), shown[-1][1]))
    return [step for step, _ in shown], [exponent for _, exponent in shown]


def _exponent_at(curve: Curve, step: int) -> float:
    """Return the exponent of the scale that a step carried; NaN, which draws nothing, if it is not known."""
    scales = [scale for start, scale in curve.loss_scales if start <= step and _is_shown(scale)]
    return math.log2(scales[-1]) if scales else math.nan


def _count(arm: ArmResult) -> str:
    skipped = [len(curve.skipped) for curve in arm.curves]
    least, most = min(skipped), max(skipped)
    return f"{least} skipped" if least == most else f"{least} to {most} skipped"
