"""What `duotone compare` shows in a terminal of 80 columns: the figures of the page and of Markdown."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from duotone.cli.compare_report import show_difference, show_report
from duotone.compare import Report, difference
from duotone.compare.report.columns import arm_columns

from ..compare.report.made_reports import alone, few, many, trials_only, usual


def shown(report: Report) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    show_report(report, Path("folder"), console)
    return console.file.getvalue()


@pytest.mark.parametrize("make", [usual, many, trials_only, alone], ids=lambda make: make.__name__)
def test_a_row_for_each_arm_has_its_figures_and_fits(make) -> None:
    report = make()
    text = shown(report)
    assert max(map(len, text.splitlines())) <= 80
    columns = [column for column in arm_columns(report).values() if column.short]
    rows = [" ".join(line.split()) for line in text.splitlines()]
    for arm in report.arms:
        figures = [column.figure(arm) for column in columns]
        assert " ".join([arm.name, *filter(None, figures)]) in rows


def test_largest_micro_batches_are_a_table(tmp_path: Path) -> None:
    text = shown(many())
    assert "Largest micro-batch in 2.00 GB" in text
    assert "bf16 48 12,000 1.97 GB" in [" ".join(line.split()) for line in text.splitlines()]


def test_a_difference_shows_both_figures_and_their_change() -> None:
    first = few()
    bf16 = first.arms[2]
    assert bf16.quality is not None
    assert bf16.peak_memory_bytes is not None
    better = replace(bf16.quality, value=bf16.quality.value - 0.01)
    half = replace(bf16, peak_memory_bytes=bf16.peak_memory_bytes // 2, quality=better)
    second = replace(first, arms=(*first.arms[:2], half), environment={**first.environment, "torch": "2.14.0"})
    console = Console(file=io.StringIO(), width=80, highlight=False)
    show_difference(difference(first, second), ("a", "b"), console)
    text = console.file.getvalue()
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "fp32 1.16 s 1.16 s 1.00 1.00 1.00 1.00" in rows
    assert "bf16 341 MB 171 MB 0.50 2.3991 2.3891 0.0100 better" in rows
    assert "- torch: 2.13.0, then 2.14.0" in rows
    assert max(map(len, text.splitlines())) <= 80
