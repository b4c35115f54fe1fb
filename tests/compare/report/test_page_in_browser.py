"""The page in a headless Chromium: nothing overflows, no label is missing or covered, in light, dark and on paper."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from duotone.compare.report.charts.names import shortened
from duotone.compare.report.page import page
from duotone.compare.report.report import Report

from . import made_reports
from .browser import find_chromium, measure, photograph, print_out

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium; apt-get install chromium"),
]

WIDTHS = (360, 768, 1280)
STATES: dict[str, Callable[[], Report]] = {
    name: getattr(made_reports, name)
    for name in ("usual", "few", "many", "hostile", "trials_only", "alone", "without_baseline")
}
Found = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a file for every state's page."""
    folder = tmp_path_factory.mktemp("pages")
    for name, make in STATES.items():
        (folder / f"{name}.html").write_text(page(make()), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in STATES}


@pytest.fixture(scope="module")
def found(pages: dict[str, Path]) -> Found:
    """Return what the browser measured in each page at each width."""
    return measure(list(pages.values()), WIDTHS)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_overlaps_or_is_loaded(found: Found, state: str, width: int) -> None:
    there = found[f"{state}.html", width]
    assert there["faults"] == []
    assert there["loaded"] == []


@pytest.mark.parametrize("state", STATES)
def test_every_label_is_there(found: Found, state: str) -> None:
    report, charts = STATES[state](), found[f"{state}.html", 360]["charts"]
    lines = {label for name, labels in charts.items() if name.startswith("loss-a") for label in labels}
    lines |= {label for name, labels in charts.items() if name.endswith("-steps") for label in labels}
    for arm in report.arms:
        if any(np.isfinite(loss) for curve in arm.curves for _, loss in curve.losses):
            assert {arm.name, f"{arm.name}, the baseline"} & lines, arm.name
        if arm.phases is not None:
            assert any(is_name(label, arm.name) for label in charts["phases"]), arm.name
        if arm.peak_memory_bytes is not None:
            assert any(is_name(label, arm.name) for label in charts["memory"]), arm.name
        if any(scale != 1.0 for curve in arm.curves for _, scale in curve.loss_scales):
            assert {arm.name, "first seed", "skipped step"} <= set(charts["loss-scale"])
    assert {"forward", "backward", "update"} <= set(charts["phases"])
    if "memory" in charts:
        roles = {"weights", "gradients", "moments", "saved activations", "measured peak"}
        assert roles <= set(charts["memory"])
    for name, labels in charts.items():
        if name.startswith("loss-"):
            assert any(re.fullmatch(r"step|(second|minute|hour)s of training", label) for label in labels), name
            assert sum(re.fullmatch(r"[\d.,]+", label) is not None for label in labels) >= 3, name


def is_name(label: str, name: str) -> bool:
    return (len(label) >= 10 and label == shortened(name, len(label))) or label == name


# what is broken, and what the browser must say of it
BROKEN = {
    "a wide block": ("</main>", '<div style="width: 2000px">wide</div></main>', "the page scrolls sideways"),
    "an unbroken line": ("</main>", f'<i style="white-space: nowrap">{"x" * 900}</i></main>', "outside the page"),
    "a narrow box": (
        "</main>",
        '<p style="width: 30px; white-space: nowrap">Mississippi</p></main>',
        "does not hold its content",
    ),
    "long letters in a drawing": (">1.16 s</text>", f">{'1.16 s' * 20}</text>", "outside its drawing: 1.16 s"),
    "a label on another": (">fp32</text>", '>fp32</text><text x="2" y="16">fp32</text>', "overlap: fp32 and fp32"),
    "tiny letters": ("font-size: 11px", "font-size: 4px", "too small to read"),
    "something from elsewhere": ("</main>", '<img src="http://127.0.0.1:9/elsewhere.png"></main>', "elsewhere.png"),
}


@pytest.fixture(scope="module")
def found_broken(pages: dict[str, Path]) -> Found:
    """Return what the browser measured in pages that were broken on purpose."""
    text, files = pages["usual"].read_text(encoding="utf-8"), []
    for what, (sound, broken, _) in BROKEN.items():
        assert sound in text, what
        files.append(pages["usual"].with_name(f"{what}.html"))
        files[-1].write_text(text.replace(sound, broken), encoding="utf-8")
    return measure(files, [360])


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_page_is_found_out(found_broken: Found, what: str) -> None:
    there = found_broken[f"{what}.html", 360]
    assert BROKEN[what][2] in " ".join([*there["faults"], *there["loaded"]])


def test_it_is_light_by_day_and_dark_by_night(pages: dict[str, Path], found: Found, tmp_path: Path) -> None:
    for width, dark in ((360, False), (768, False), (1280, False), (1280, True)):
        height = found["usual.html", width]["height"]
        photograph(pages["usual"], width, height, tmp_path / "page.png", dark)
        picture = matplotlib.image.imread(tmp_path / "page.png")[:, :width, :3]
        assert picture.shape[0] == height
        paper = np.median(picture, axis=(0, 1))
        assert np.all(paper < 0.15 if dark else paper > 0.95)
        # charts and letters in every part of it, but for the margin at its end
        parts = np.array_split(np.abs(picture - paper).max(axis=2), 12)[:-3]
        assert all((part > 0.4).any() for part in parts)


def test_it_prints(pages: dict[str, Path], tmp_path: Path) -> None:
    sizes = {}
    for state in ("trials_only", "many"):
        print_out(pages[state], tmp_path / "page.pdf")
        printed = (tmp_path / "page.pdf").read_bytes()
        assert printed.startswith(b"%PDF")
        sizes[state] = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert 1 <= sizes["trials_only"] <= 3
    assert sizes["trials_only"] < sizes["many"] <= 10
