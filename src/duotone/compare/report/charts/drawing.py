"""One chart: a matplotlib figure that becomes an SVG to stand inside an HTML page.

No state of pyplot is touched, and settings of the user's own matplotlib do not count. The result is the same bytes at
every call: no date, ids from the chart's own name, coordinates in hundredths of a point.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from duotone.compare.report.charts.palette import STAND_INS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 5.0
TEXT_POINTS = 11.0
# of labels that five find room for on a horizontal axis, the last one moved to the left
_NARROW_LETTERS = 6

_SVG = "http://www.w3.org/2000/svg"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"-?\d+\.\d+")
_COLOURS = {stand_in: f"var(--{name})" for name, stand_in in STAND_INS.items()}


@dataclass(frozen=True)
class Key:
    """One entry of a chart's legend, which the page shows beside the drawing.

    Attributes:
        text: what it stands for.
        kind: "line", "area" or "mark".
        colour: a name of the palette.
        width: of a line, in points.
        dashes: of a line, in points.
    """

    text: str
    kind: str
    colour: str
    width: float = 0.0
    dashes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A finished chart.

    Attributes:
        name: that no other chart of the page has; letters, digits and hyphens.
        title: what it shows.
        unit: of its values, or how to read it.
        svg: the drawing.
        keys: its legend.
        header: of the same figures as a table; empty without one.
        rows: of that table.
    """

    name: str
    title: str
    unit: str
    svg: str
    keys: tuple[Key, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = field(default=())


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with Duotone's settings, whatever the user's own are; they are back at the end."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # the reader's browser chooses the font: what is missing in the one that text is measured with is no loss
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "duotone",
                "text.parse_math": False,
                "axes.unicode_minus": False,
                "font.size": TEXT_POINTS,
                "text.color": STAND_INS["ink"],
                "axes.labelcolor": STAND_INS["muted"],
                "xtick.labelcolor": STAND_INS["muted"],
                "ytick.labelcolor": STAND_INS["muted"],
                "axes.edgecolor": STAND_INS["rule"],
                "xtick.color": STAND_INS["rule"],
                "ytick.color": STAND_INS["rule"],
                "grid.color": STAND_INS["rule"],
                "grid.linewidth": 0.6,
                "axes.linewidth": 0.6,
                "axes.axisbelow": True,
                "xtick.major.size": 0.0,
                "ytick.major.size": 0.0,
                "xtick.minor.size": 0.0,
                "ytick.minor.size": 0.0,
                "xtick.major.pad": 5.0,
                "ytick.major.pad": 5.0,
            }
        )
        yield


def new_figure(height_inches: float) -> "Figure":
    """Return an empty figure of a chart's width; to be called within `drawing`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_INCHES, height_inches), frameon=False)


def bare(axes: "Axes", *sides: str) -> None:
    """Take an axes' background and frame away, but for the sides that are named."""
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in sides)


def tidy_ticks(axes: "Axes", x_written: Callable[[float], str]) -> None:
    """Fix the ticks of an axes whose limits are set, so that no label reaches out of the drawing.

    The last label of the horizontal axis stands left of its tick if that is near the right end. The axes' left side
    moves to make room for the widest label of the vertical axis.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    left, right = axes.get_xlim()
    places = [place for place in axes.get_xticks() if left <= place <= right]
    if any(len(x_written(place)) > _NARROW_LETTERS for place in places):
        # wide labels side by side would touch
        places = places[::2]
    axes.set_xticks(places, [x_written(place) for place in places])
    if places and places[-1] > left + 0.9 * (right - left):
        axes.get_xticklabels()[-1].set_horizontalalignment("right")
    figure.draw_without_rendering()
    widths = [label.get_window_extent().width / figure.dpi for label in axes.get_yticklabels()]
    box = axes.get_position()
    start = (max(widths, default=0.0) + 8.0 / 72) / WIDTH_INCHES
    axes.set_position((start, box.y0, box.x1 - start, box.height))


def to_svg(figure: "Figure", name: str, label: str) -> str:
    """Return a figure as an `<svg>` element.

    Args:
        figure: drawn with the palette's stand-ins alone.
        name: that every id in it starts with.
        label: what the chart shows, for those who do not see it.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    root = ElementTree.fromstring(text.getvalue())
    _strip(root)
    used = {match for element in root.iter() for match in _references(element)}
    for element in root.iter():
        _rewrite(element, name, used)
    view_box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"xmlns": _SVG, "viewBox": view_box, "role": "img", "aria-label": label})
    title = ElementTree.Element("title")
    title.text = label
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _strip(element: ElementTree.Element) -> None:
    """Leave out metadata, styles (they would hold for the whole page) and groups without content."""
    for child in list(element):
        _strip(child)
        name = child.tag.rpartition("}")[2]
        if name in ("metadata", "style") or (name in ("g", "defs") and not len(child)):
            element.remove(child)


def _references(element: ElementTree.Element) -> Iterator[str]:
    for value in element.attrib.values():
        yield from _REFERENCE.findall(value)
        if value.startswith("#"):
            yield value[1:]


def _rewrite(element: ElementTree.Element, name: str, used: set[str]) -> None:
    element.tag = element.tag.rpartition("}")[2]
    element.tail = None
    if element.tag != "text":
        element.text = None
    old, element.attrib = element.attrib, {}
    for key, value in old.items():
        plain = key.rpartition("}")[2]
        if plain == "id":
            if value in used:
                element.set("id", f"{name}-{value}")
        elif plain == "href":
            element.set("href", f"#{name}-{value[1:]}")
        elif plain == "style":
            element.set("style", _style(value, name))
        elif plain != "transform" or not value.startswith("rotate(-0 "):
            short = _NUMBER.sub(lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)
            element.set(plain, " ".join(_REFERENCE.sub(rf"url(#{name}-\1)", short).split()))


def _style(value: str, name: str) -> str:
    """Return a style with the page's font, CSS variables for stand-ins, and ids that start with the chart's name."""
    parts = [part.strip() for part in value.split(";")]
    kept = "; ".join(part for part in parts if part and not part.startswith("font-family"))
    for stand_in, variable in _COLOURS.items():
        kept = kept.replace(stand_in, variable)
    return _REFERENCE.sub(rf"url(#{name}-\1)", kept)
