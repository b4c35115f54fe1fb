"""A report as one HTML page that needs nothing else: no network, no script; charts and styles are inside.

The words and the order are in `templates/page.html`, the looks in `templates/page.css`, which serves light, dark,
phones and paper.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from operator import attrgetter

from duotone.compare.report import words
from duotone.compare.report.charts.costs import fit_chart, memory_chart, phase_chart
from duotone.compare.report.charts.curves import loss_charts
from duotone.compare.report.charts.drawing import Chart
from duotone.compare.report.charts.groups import GROUPS, by_group
from duotone.compare.report.charts.scales import power_of_two, scale_chart
from duotone.compare.report.columns import arm_columns, evaluation_table
from duotone.compare.report.report import Report
from duotone.compare.report.sections import sections

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
        "power": power_of_two,
        "quality": words.quality,
        "quality_range": lambda spread: words.range_of(spread, words.quality),
        "spaced": lambda name: name.replace("_", " "),
        "worse": words.worse,
    }
    environment.filters.update(written)
    columns = arm_columns(report)
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
        columns=columns,
        shown=[key for key in columns if key != "memory_ratio"],
        evaluation=evaluation_table(report),
        sections=list(sections(report)),
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


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
