"""Colours by name, and how the lines of one chart differ.

matplotlib draws with stand-ins that no other colour equals; in the finished SVG each becomes a CSS variable, so that
one drawing serves light, dark and paper. Lines differ in dashes as well as in colour, neighbouring areas in lightness.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from duotone.compare.report.report import ArmResult

LINES = ("line-1", "line-2", "line-3", "line-4", "line-5", "line-6")
PARTS = ("part-1", "part-2", "part-3", "part-4", "part-5", "part-6")
NAMES = ("ink", "muted", "rule", "paper", "baseline", "accent", "mark", *LINES, *PARTS)

STAND_INS = {name: f"#0a0b{index:02x}" for index, name in enumerate(NAMES, 16)}

# on, off, ... in points; neighbours in the palette never share one
_DASHES = ((), (5.0, 1.6), (1.4, 1.4), (7.0, 1.6, 1.4, 1.6))


@dataclass(frozen=True)
class LineStyle:
    """How an arm's line looks, in a chart and in its legend.

    Attributes:
        colour: a name of the palette.
        width: in points.
        dashes: on and off in points; empty for a solid line.
    """

    colour: str
    width: float
    dashes: tuple[float, ...]


def line_styles(arms: Sequence[ArmResult], baseline: str) -> dict[str, LineStyle]:
    """Return a style for each arm of one chart, by name.

    The baseline is a broad pale line below the others, so that lines on top of it stay visible; Duotone's are a little
    stronger than the rest. With more arms than colours, colours come again with other dashes.

    >>> line_styles([], "fp32")
    {}
    """
    others = [arm for arm in arms if arm.name != baseline]
    styles = {baseline: LineStyle("baseline", 4.0, ())} if len(others) < len(arms) else {}
    for index, arm in enumerate(others):
        dashes = _DASHES[(index + index // len(LINES)) % len(_DASHES)]
        width = 1.9 if arm.group == "duotone" else 1.5
        styles[arm.name] = LineStyle(LINES[index % len(LINES)], width, dashes)
    return styles
