"""What charts draw is what was measured: lengths, ends, marks, and colours that everybody can tell apart."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from duotone.compare.report.charts import palette
from duotone.compare.report.charts.costs import fit_chart, memory_chart, phase_chart
from duotone.compare.report.charts.curves import loss_charts
from duotone.compare.report.charts.drawing import Chart
from duotone.compare.report.charts.names import shortened
from duotone.compare.report.charts.palette import line_styles
from duotone.compare.report.charts.scales import power_of_two, scale_chart
from duotone.compare.report.charts.thinning import mean_line
from duotone.compare.report.report import Curve

from .made_reports import alone, few, many, report_of, trials_only, usual, without_baseline

CSS = Path(palette.__file__).parents[1] / "templates" / "page.css"


def curve(*losses: float, seed: int = 0) -> Curve:
    return Curve(seed, tuple(enumerate(losses, 1)), ((1, 1.0),), (), 0.5)


def elements(chart: Chart, tag: str, colour: str) -> list[ElementTree.Element]:
    found = ElementTree.fromstring(chart.svg).iter(f"{{http://www.w3.org/2000/svg}}{tag}")
    return [element for element in found if f"var(--{colour})" in (element.get("style") or "")]


def numbers(element: ElementTree.Element) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", element.get("d") or "")]


def labels(chart: Chart) -> list[str]:
    root = ElementTree.fromstring(chart.svg)
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_line_is_the_mean_over_seeds_and_keeps_their_range() -> None:
    line = mean_line([curve(4.0, 2.0), curve(2.0, 1.0, seed=1)], points=10)
    assert line.values == (3.0, 1.5)
    assert (line.lower, line.upper) == ((2.0, 1.0), (4.0, 2.0))
    assert line.step_seconds == 0.5


def test_thinning_averages_and_ends_at_the_last_step() -> None:
    line = mean_line([curve(*range(1000))], points=100)
    assert len(line.values) == 100
    assert line.values[0] == pytest.approx(4.5)
    assert line.steps[-1] == 1000
    assert len(mean_line([curve(*range(1001))], points=100).values) <= 100


def test_a_line_ends_where_any_seed_is_not_finite() -> None:
    line = mean_line([curve(3.0, 2.0, 1.0), curve(3.0, math.inf, 1.0, seed=1)], points=10)
    assert (line.steps, line.broke_at) == ((1.0,), 2)
    assert mean_line([curve(math.nan)], points=10).values == ()


def test_a_run_that_stopped_early_counts_as_far_as_it_came() -> None:
    assert mean_line([curve(4.0, 4.0), curve(2.0, seed=1)], points=10).values == (3.0, 4.0)


def test_lines_of_one_chart_all_look_different() -> None:
    arms = many().arms
    styles = line_styles(arms, "fp32")
    assert len({(style.colour, style.dashes) for style in styles.values()}) == len(arms)
    assert styles["fp32"].width > max(style.width for name, style in styles.items() if name != "fp32")
    assert styles["bf16"].width > styles["accelerate-bf16"].width
    assert "fp32" not in line_styles(arms[1:], "fp32")


def test_few_short_names_stand_in_the_chart_and_others_in_its_legend() -> None:
    short = report_of([arm for arm in few().plan.arms if len(arm.name) <= 10])
    for chart in loss_charts(short):
        assert {"fp32", "bf16"} <= set(labels(chart))
        assert not chart.keys
    for chart in loss_charts(usual()):
        assert not {"fp32", "bf16"} & set(labels(chart))
        assert [key.text.partition(",")[0] for key in chart.keys] == [arm.name for arm in usual().arms]


def test_a_mean_is_called_one_where_it_is() -> None:
    assert loss_charts(few())[0].unit == "loss, by step; mean over seeds"
    assert loss_charts(alone())[0].unit == "loss, by step"


def test_many_arms_get_a_chart_for_each_group_beside_the_baseline() -> None:
    charts = loss_charts(many())
    assert len(charts) == 8
    by_chart = [{key.text for key in chart.keys} | set(labels(chart)) for chart in charts]
    assert all({"fp32", "fp32, the baseline"} & names for names in by_chart)
    names = set().union(*by_chart)
    assert all({arm.name, f"{arm.name}, the baseline"} & names for arm in many().arms if arm.curves)


def test_an_arm_that_broke_is_marked_and_named() -> None:
    broken = [chart for chart in loss_charts(many()) if any(key.kind == "mark" for key in chart.keys)]
    assert [chart.name for chart in broken] == ["loss-ablations-steps", "loss-ablations-time"]
    assert broken[0].keys[-1].text == "no longer finite: fp16-no-scaling at step 704"
    assert elements(broken[0], "use", "mark")
    for chart in loss_charts(without_baseline()):
        assert chart.keys[-1].text == "no longer finite: fp16 at step 10"


def test_the_frame_is_the_baselines_whatever_the_others_do() -> None:
    report = usual()
    wild = replace(report.arms[1], curves=(curve(*[10.0**exponent for exponent in range(12)]),))
    charts = loss_charts(replace(report, arms=(report.arms[0], wild, *report.arms[2:])))
    ticks = [float(label) for label in labels(charts[0]) if re.fullmatch(r"[\d.]+", label)]
    assert max(tick for tick in ticks if tick < 100) <= 6


@pytest.mark.parametrize("losses", [(0.0, 0.0), (1e-9, 2e-9), (1e6, 5e5), (2.0,), (-3.0, -4.0)])
def test_losses_of_any_size_are_drawn(losses: tuple[float, ...]) -> None:
    report = few()
    arm = replace(report.arms[0], curves=(curve(*losses),))
    for chart in loss_charts(replace(report, arms=(arm,))):
        assert elements(chart, "path", "baseline")


def test_bars_are_as_long_as_the_phases() -> None:
    report = usual()
    chart = phase_chart(report)
    assert chart is not None
    for phase, colour in (("forward", "part-2"), ("backward", "part-1"), ("update", "part-3")):
        bars = [numbers(bar) for bar in elements(chart, "path", colour)]
        measured = [getattr(arm.phases, phase) for arm in report.arms]
        lengths = [max(bar[::2]) - min(bar[::2]) for bar in bars]
        assert [length / lengths[0] for length in lengths] == pytest.approx(
            [m / measured[0] for m in measured], abs=1e-2
        )
    assert [row[0] for row in chart.rows] == [arm.name for arm in report.arms]


def test_peaks_are_marked_on_the_scale_of_the_bars() -> None:
    report = usual()
    chart = memory_chart(report)
    assert chart is not None
    marks = [numbers(mark)[0] for mark in elements(chart, "path", "mark")]
    bars = [numbers(bar) for bar in elements(chart, "path", "part-6")]
    for arm, mark, bar in zip(report.arms, marks, bars, strict=True):
        counted = sum(arm.memory.values()) + arm.saved_bytes
        assert arm.peak_memory_bytes is not None
        assert mark / max(bar[::2]) == pytest.approx(arm.peak_memory_bytes / counted, rel=1e-3)
    assert "measured peak" in [key.text for key in chart.keys]


def test_memory_without_a_peak_has_no_mark() -> None:
    report = usual()
    chart = memory_chart(replace(report, arms=tuple(replace(arm, peak_memory_bytes=None) for arm in report.arms)))
    assert chart is not None
    assert not elements(chart, "path", "mark")
    assert "measured peak" not in [key.text for key in chart.keys]
    assert {row[-1] for row in chart.rows} == {"unknown"}


def test_skipped_steps_are_marked_where_they_were() -> None:
    report = usual()
    chart = scale_chart(report)
    assert chart is not None
    marks = elements(chart, "use", "mark")
    arm = next(arm for arm in report.arms if arm.name == "fp16")
    assert len(marks) == len(arm.curves[0].skipped)
    # a skipped step carried the scale from before it fell: the second mark is one power below the first
    assert float(marks[1].get("y", "")) > float(marks[0].get("y", ""))
    assert [label for label in labels(chart) if label.startswith("2")][:3] == ["2¹⁴", "2¹⁵", "2¹⁶"]
    assert scale_chart(few()) is None
    assert scale_chart(trials_only()) is None


def test_a_search_for_the_largest_micro_batch_says_what_came_of_each() -> None:
    report = many()
    arms = list(report.arms)
    assert arms[0].fit is not None
    arms[0] = replace(arms[0], fit=replace(arms[0].fit, micro_batch=0))
    chart = fit_chart(replace(report, arms=tuple(arms)))
    assert chart is not None
    assert chart.title == "Largest micro-batch in 2.00 GB"
    assert {"not even one fits", "not installed"} <= set(labels(chart))
    assert "48 samples, 12,000 bytes/s" in labels(chart)
    assert len(elements(chart, "path", "part-1")) == len(arms) - 2


def test_nothing_measured_is_no_chart() -> None:
    report = trials_only()
    empty = replace(report, arms=report.arms[2:])
    assert (phase_chart(empty), memory_chart(empty), fit_chart(empty), loss_charts(empty)) == (None, None, None, ())


def test_labels_are_shortened_in_the_middle() -> None:
    assert shortened("a" * 20, 20) == "a" * 20
    assert len(shortened("abc" * 20, 21)) == 21
    assert power_of_two(2.0**-14) == "2⁻¹⁴"
    assert power_of_two(math.inf) == "inf"


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_stand_out_from_the_paper_and_from_each_other(scheme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", CSS.read_text(encoding="utf-8"), re.DOTALL)[scheme]
    colours = {name: linear(value) for name, value in re.findall(r"--([\w-]+): #(\w{6})", block)}
    assert set(palette.NAMES) <= set(colours)
    paper = luminance(colours["paper"])
    for name in ("ink", "muted", "mark", "accent", *palette.LINES):
        light, dark = sorted((paper, luminance(colours[name])), reverse=True)
        needed = 4.5 if name in ("ink", "muted", "accent") else 3.0
        assert (light + 0.05) / (dark + 0.05) >= needed, name
    for names in (palette.LINES, palette.PARTS):
        for one, other in itertools.combinations(names, 2):
            for eyes in EYES.values():
                assert distance(see(colours[one], eyes), see(colours[other], eyes)) > 10, (one, other)


# Machado, Oliveira and Fernandes 2009, severity 1
EYES = {
    "all cones": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
Triple = tuple[float, ...]


def linear(value: str) -> Triple:
    parts = (int(value[start : start + 2], 16) / 255 for start in (0, 2, 4))
    return tuple(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)


def luminance(colour: Triple) -> float:
    return dot((0.2126, 0.7152, 0.0722), colour)


def dot(left: Triple, right: Triple) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def see(colour: Triple, eyes: tuple[Triple, ...]) -> Triple:
    return tuple(min(max(dot(row, colour), 0.0), 1.0) for row in eyes)


def distance(one: Triple, other: Triple) -> float:
    return math.dist(lab(one), lab(other))


def lab(colour: Triple) -> Triple:
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.95047, 1.0, 1.08883)
    parts = [dot(row, colour) / full for row, full in zip(rows, white, strict=True)]
    x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in parts)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)
