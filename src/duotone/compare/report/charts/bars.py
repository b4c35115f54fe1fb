"""Horizontal bars, one row for each arm; its name and its figure stand above, where even a phone has room for them.

Rows of one group stand together, a little apart from the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duotone.compare.report.charts.drawing import bare, drawing, new_figure, to_svg
from duotone.compare.report.charts.names import shortened
from duotone.compare.report.charts.palette import STAND_INS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW_POINTS, _GROUP_POINTS, _MARGIN_POINTS = 33.0, 9.0, 4.0
_BAR_POINTS, _BAR_TOP_POINTS = 10.0, 17.0
# letters that a row's name and figure share
_LETTERS = 48
# room for a mark's own width at the right edge
_FULL = 0.985


@dataclass(frozen=True)
class Row:
    """One bar.

    Attributes:
        name: of the arm.
        group: of the arm.
        parts: lengths of its segments, in the order of the chart's colours; empty where there is nothing to show.
        figure: what stands at its right end.
        mark: a place on the bar's scale that is marked, or None.
    """

    name: str
    group: str
    parts: tuple[float, ...]
    figure: str
    mark: float | None = None


def bar_drawing(rows: Sequence[Row], colours: Sequence[str], name: str, title: str) -> str:
    """Return the SVG of a chart of bars, whose scale starts at zero and ends with the longest.

    Args:
        rows: from the top.
        colours: of the segments, names of the palette.
        name: of the chart.
        title: of the chart.
    """
    tops = _tops(rows)
    points = tops[-1] + _ROW_POINTS + _MARGIN_POINTS
    longest = max(max(sum(row.parts), row.mark or 0.0) for row in rows) or 1.0
    with drawing():
        figure = new_figure(points / 72)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        bare(axes)
        axes.set_axis_off()
        axes.set_xlim(0.0, 1.0)
        # one unit of the vertical axis is a point, counted from the top
        axes.set_ylim(points, 0.0)
        for row, top in zip(rows, tops, strict=True):
            _draw(axes, row, top, longest / _FULL, colours)
        label = f"{title}: " + "; ".join(f"{row.name} {row.figure}" for row in rows)
        return to_svg(figure, name, label)


def _tops(rows: Sequence[Row]) -> list[float]:
    tops, top = [], _MARGIN_POINTS
    for index, row in enumerate(rows):
        if index and row.group != rows[index - 1].group:
            top += _GROUP_POINTS
        tops.append(top)
        top += _ROW_POINTS
    return tops


def _draw(axes: "Axes", row: Row, top: float, full: float, colours: Sequence[str]) -> None:
    name = shortened(row.name, _LETTERS - len(row.figure))
    axes.text(0.0, top + 12.0, name, va="baseline", ha="left")
    axes.text(1.0, top + 12.0, row.figure, va="baseline", ha="right", color=STAND_INS["muted"])
    middle, start = top + _BAR_TOP_POINTS + _BAR_POINTS / 2, 0.0
    for length, colour in zip(row.parts, colours, strict=False):
        if length > 0:
            # a thin edge in the page's own colour keeps neighbours apart without any hue
            look = {"color": STAND_INS[colour], "edgecolor": STAND_INS["paper"], "linewidth": 0.8}
            axes.barh(middle, length / full, _BAR_POINTS, start / full, **look)
            start += length
    if row.mark is not None:
        place, ends = row.mark / full, [top + _BAR_TOP_POINTS - 0.5, top + _BAR_TOP_POINTS + _BAR_POINTS + 2.5]
        axes.plot([place] * 2, ends, color=STAND_INS["paper"], linewidth=4.2, zorder=3)
        axes.plot([place] * 2, ends, color=STAND_INS["mark"], linewidth=2.0, zorder=4)
