"""The page's contents in every state of a comparison: nothing missing, nothing unescaped, nothing from elsewhere."""

import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import pytest

from duotone.compare.report.page import page
from duotone.compare.report.report import Report

from . import made_reports
from .made_reports import HOSTILE, LONG

STATES: dict[str, Callable[[], Report]] = {
    name: getattr(made_reports, name)
    for name in ("usual", "few", "many", "hostile", "trials_only", "alone", "without_baseline")
}


class Reader(HTMLParser):
    """Collects what a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Return the page of every state, made without a single warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {name: page(make()) for name, make in STATES.items()}


def drawings(text: str) -> list[str]:
    return re.findall(r"<svg xmlns=.*?</svg>", text, re.DOTALL)


@pytest.mark.parametrize("state", STATES)
def test_every_arm_has_a_row_with_what_came_of_it(pages: dict[str, str], state: str) -> None:
    report, words = STATES[state](), Reader(pages[state]).words
    assert len(re.findall('<tr class="arm">', pages[state])) == len(report.arms)
    for arm in report.arms:
        assert arm.name in words
        if arm.failure is not None:
            assert f"{arm.failure.kind}:" in words
            assert arm.failure.reason in words
        if arm.quality is not None and arm.name != report.plan.baseline:
            assert f"{arm.quality_verdict}" in words


@pytest.mark.parametrize("state", STATES)
def test_every_sentence_of_the_report_is_there(pages: dict[str, str], state: str) -> None:
    report, words = STATES[state](), " ".join(Reader(pages[state]).words)
    sentences = [*report.verdicts, *report.rules, *report.remarks, *report.commands]
    sentences += [
        text for facts in (report.environment, report.subject.facts) for pair in facts.items() for text in pair
    ]
    sentences += [*report.subject.baselines, *(note for arm in report.arms for note in arm.notes)]
    for sentence in sentences:
        assert sentence in words


def test_figures_are_written_out(pages: dict[str, str]) -> None:
    words = Reader(page(replace(STATES["few"](), arms=STATES["few"]().arms[:2]))).words
    arm = STATES["few"]().arms[1]
    assert arm.times_faster is not None
    assert f"{arm.times_faster.value:.2f}" in words
    assert f"{arm.times_faster.lower:.2f} to {arm.times_faster.upper:.2f}" in words
    assert {"366 MB", "0.62 times", "16", "no worse"} <= set(words)
    assert "scale 2¹⁴" in Reader(pages["usual"]).words


@pytest.mark.parametrize(
    ("environment", "machine"),
    [
        ({"device": "cuda", "gpu": "H100", "cpu": "Example 9000"}, "H100"),
        ({"device": "cpu", "cpu": "Example 9000"}, "Example 9000"),
        ({"device": "cpu"}, "cpu"),
    ],
)
def test_the_line_below_the_title_names_the_processor(environment: dict[str, str], machine: str) -> None:
    text = page(replace(STATES["alone"](), environment=environment))
    facts = re.search(r'<p class="facts">.*</p>', text)
    assert facts is not None
    assert Reader(facts[0]).words[-1] == machine


@pytest.mark.parametrize("state", STATES)
def test_nothing_comes_from_elsewhere(pages: dict[str, str], state: str) -> None:
    reader = Reader(pages[state])
    assert not {"script", "link", "img", "iframe", "object", "b"} & set(reader.tags)
    assert all(value.startswith("#") for value in reader.values("src", "href", "xlink:href", "srcset", "data"))
    assert not re.search(r"@import|url\((?!#)", pages[state])
    assert set(re.findall(r"https?://[^\s\"<]*", pages[state])) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("state", STATES)
def test_ids_are_unique_and_references_lead_to_them(pages: dict[str, str], state: str) -> None:
    reader = Reader(pages[state])
    ids = reader.values("id")
    assert len(ids) == len(set(ids))
    # in names of arms, too, a bracket may stand after url: attributes alone are looked at
    asked = [value[1:] for value in reader.values("href")]
    asked += [name for value in reader.values("clip-path", "style") for name in re.findall(r"url\(#([^)]*)\)", value)]
    assert asked or state == "trials_only"
    assert set(asked) <= set(ids)


@pytest.mark.parametrize("state", STATES)
def test_drawings_are_whole_and_take_every_colour_from_the_page(pages: dict[str, str], state: str) -> None:
    style, _, _ = pages[state].partition("</style>")
    assert drawings(pages[state])
    for drawing in drawings(pages[state]):
        root = ElementTree.fromstring(drawing)
        assert set(root.attrib) == {"viewBox", "role", "aria-label"}
        assert root[0].tag.endswith("title")
        assert root[0].text == root.get("aria-label")
        names = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert not {"style", "metadata", "script", "image", "b"} & names
        looks = [value for element in root.iter() if (value := element.get("style"))]
        assert not [look for look in looks if re.search(r"#[0-9a-f]{6}|font-family|rgb", look)]
        colours = set(re.findall(r"var\(--([a-z0-9-]+)\)", " ".join(looks)))
        assert all(style.count(f"--{colour}: ") >= 2 for colour in colours), "one for light, one for dark"
        # text without a colour would be black, on black in dark mode
        assert all("fill: var(" in (text.get("style") or "") for text in root.iter() if text.tag.endswith("}text"))


def test_what_could_be_markup_is_text(pages: dict[str, str]) -> None:
    text, reader = pages["hostile"], Reader(pages["hostile"])
    assert HOSTILE not in text
    assert escape(HOSTILE, quote=False) in text
    assert reader.words.count(HOSTILE) > 5
    charts = " ".join(drawings(text))
    assert "&lt;b&gt;&amp;" in charts
    # the middle of a long name is left out in a chart, and whole in what is read aloud
    assert f"{LONG[:10]}" in charts
    assert LONG in charts


def test_charts_of_what_there_is_and_no_others(pages: dict[str, str]) -> None:
    ids = {state: set(Reader(text).values("id")) for state, text in pages.items()}
    pair = {"loss-all-steps", "loss-all-time"}
    assert {*pair, "phases", "memory", "loss-scale"} <= ids["usual"]
    assert "fit" not in ids["usual"]
    groups = {
        f"loss-{group}-{over}" for group in ("torch", "duotone", "peers", "ablations") for over in ("steps", "time")
    }
    assert {*groups, "phases", "memory", "loss-scale", "fit"} <= ids["many"]
    assert not pair & ids["many"]
    assert {"phases", "memory"} <= ids["trials_only"]
    assert not {*pair, "loss-scale"} & ids["trials_only"]
    assert not {"memory", "loss-scale"} & ids["alone"]
    assert "There is no verdict yet." in Reader(pages["trials_only"]).words
    finished = replace(STATES["trials_only"](), is_complete=True)
    assert "There is nothing to compare." in Reader(page(finished)).words
    assert "not measured yet" in Reader(pages["trials_only"]).words


def test_a_group_stands_together_wherever_its_arms_were_named(pages: dict[str, str]) -> None:
    report = STATES["usual"]()
    mixed = replace(report, arms=tuple(report.arms[index] for index in (2, 0, 3, 1, 4)))
    text = page(mixed)
    assert re.findall('scope="rowgroup">([^<]*)', text) == ["Duotone", "PyTorch", "Ablations"]
    assert re.findall('<span class="name">([^<]*)', text) == [
        "bf16",
        "fp16",
        "fp32",
        "torch-amp-bf16",
        "bf16-no-masters",
    ]


def test_the_same_bytes_whatever_matplotlib_is_set_to(pages: dict[str, str]) -> None:
    with matplotlib.rc_context({"font.size": 30.0, "lines.linewidth": 9.0, "axes.grid": True, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert page(STATES["usual"]()) == pages["usual"]
        assert dict(matplotlib.rcParams) == before


def test_letters_that_no_font_here_has_are_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    report = STATES["few"]()
    named = replace(report, arms=(*report.arms[:2], replace(report.arms[2], name="精度-$x_1$")))
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        assert "精度-$x_1$" in "".join(drawings(page(named)))
    assert not caplog.records


def test_a_page_of_many_arms_is_light(pages: dict[str, str]) -> None:
    assert len(pages["many"].encode()) < 600_000


def test_nothing_is_loaded_before_a_page_is_made_and_pyplot_never() -> None:
    code = (
        "import sys; from duotone.compare.report import page;"
        "assert not {'matplotlib', 'jinja2'} & set(sys.modules);"
        "sys.path.insert(0, sys.argv[1]); import made_reports; page.page(made_reports.few());"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    folder = made_reports.__file__.rpartition("made_reports")[0]
    subprocess.run([sys.executable, "-c", code, folder], check=True)
