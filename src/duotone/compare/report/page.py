"""A report as one HTML page that needs nothing else: no network, no script; charts and styles are inside.

The words and the order are in `templates/page.html`, the looks in `templates/page.css`, which serves light, dark,
phones and paper.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from operator import attrgetter

from duotone.compare.report import words
from duotone.compare.report.charts.costs import fit_chart, memory_chart, phase_chart
from duotone.compare.report.charts.curves import loss_charts
from duotone.compare.report.charts.drawing import Chart
from duotone.compare.report.charts.groups import GROUPS, by_group
from duotone.compare.report.charts.scales import power_of_two, scale_chart
from duotone.compare.report.report import ArmResult, Report, Spread

_VERDICT_SIGNS = {"no worse": "✓", "worse": "✗", "undecided": "?", "not tested": ""}


def page(report: Report) -> str:
    """Return a report as an HTML document, the same text at every call.

    Every state of a comparison has a page: without any run yet, with arms that failed, with one arm.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    report = replace(report, arms=by_group(report.arms))
    environment = Environment(
        loader=PackageLoader("duotone.compare.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = {
        "count": words.count,
        "drawing": lambda chart: Markup(chart.svg),
        "plain": "{:.3g}".format,
        "power": power_of_two,
        "quality": words.quality,
        "quality_range": lambda spread: _range(spread, words.quality),
        "rate": lambda value: words.rate(value, "").removesuffix(" /s"),
        "ratio": words.ratio,
        "ratio_range": lambda spread: _range(spread, words.ratio),
        "seconds": words.seconds,
        "seconds_range": lambda spread: _short(_range(spread, words.seconds)),
        "size": words.size,
        "spaced": lambda name: name.replace("_", " "),
        "worse": words.worse,
    }
    environment.filters.update(written)
    return environment.get_template("page.html").render(
        report=report,
        subject=report.subject,
        baseline=report.plan.baseline,
        groups=[
            (group, _sentence(GROUPS[group]), list(arms)) for group, arms in groupby(report.arms, attrgetter("group"))
        ],
        charts=list(_charts(report)),
        facts=_facts(report),
        signs=_VERDICT_SIGNS,
        evaluations=_evaluations(report),
        noted=_notes(report),
    )


def _charts(report: Report) -> Iterator[Chart]:
    yield from loss_charts(report)
    for chart in (phase_chart(report), memory_chart(report), scale_chart(report), fit_chart(report)):
        if chart is not None:
            yield chart


def _facts(report: Report) -> list[str]:
    """Return the line below the title: what was trained, how often and where."""
    facts = [f"{words.count(report.subject.parameters)} parameters", words.counted(len(report.arms), "arm")]
    if report.pace is not None:
        seeds = words.counted(len(report.plan.seeds), "seed")
        facts.append(f"{words.counted(report.pace.steps, 'step')} with {_article(seeds)}")
    machine = report.environment.get("gpu") or report.environment.get("cpu") or report.environment.get("device")
    return facts + [fact for fact in (machine, report.environment.get("date")) if fact]


def _article(seeds: str) -> str:
    return seeds if seeds == "1 seed" else f"each of {seeds}"


def _evaluations(report: Report) -> tuple[list[str], list[ArmResult]]:
    """Return the figures of the evaluation besides the quality, and the arms that have them."""
    evaluated = [arm for arm in report.arms if arm.evaluation]
    names = dict.fromkeys(name for arm in evaluated for name in arm.evaluation)
    return [name for name in names if name != report.subject.quality], evaluated


def _notes(report: Report) -> dict[str, list[str]]:
    """Return each note once, with the arms that it is of."""
    notes: dict[str, list[str]] = {}
    for arm in report.arms:
        for note in arm.notes:
            notes.setdefault(note, []).append(arm.name)
    return notes


def _range(spread: Spread, written: Callable[[float], str]) -> str:
    """Return a range alone, empty where there is none."""
    if spread.lower == spread.upper or math.isnan(spread.value):
        return ""
    return f"{written(spread.lower)} to {written(spread.upper)}"


def _short(text: str) -> str:
    """Return a range with its unit only once, if both ends have the same.

    >>> _short("1.13 s to 1.21 s"), _short("990 ms to 1.01 s")
    ('1.13 to 1.21 s', '990 ms to 1.01 s')
    """
    lower, _, upper = text.partition(" to ")
    unit = " " + upper.rpartition(" ")[2]
    return f"{lower.removesuffix(unit)} to {upper}" if upper and lower.endswith(unit) else text


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
