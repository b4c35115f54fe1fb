"""Markdown whose tables have a cell for each column, and what stands in them."""

from pathlib import Path

import pytest

from duotone.compare.report.assembly import assemble
from duotone.compare.report.markdown import markdown
from duotone.compare.report.report import Report

from .made_records import SHAPES, Made, made_folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return assemble(made_folder(tmp_path_factory.mktemp("made") / "whole", Made(fits=True)))


def cells(line: str) -> list[str]:
    assert line.startswith("|")
    assert line.endswith("|")
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_table_is_rectangular(report: Report) -> None:
    text = markdown(report)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [9, 9, 8, 8, 7]
    for table in tables:
        assert {len(line.split("|")) for line in table} == {len(cells(table[0])) + 2}
        assert set(table[1]) == {"|", "-", ":"}


def test_all_parts_are_there_in_their_order(report: Report) -> None:
    text = markdown(report)
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == [
        "# stdlib-text under 7 arms", "## Verdicts", "## Arms", "## Largest micro-batch in 500 MB",
        "## Time per step by phase", "## Memory by role", "## Every figure of the evaluation",
        "## How it was judged", "## To know", "## What was warned of", "## What was trained",
        "## Simple methods on the same data", "## Environment", "## To repeat it",
    ]  # fmt: skip
    for line in (*report.verdicts, *report.rules, *report.remarks):
        assert f"- {line}\n" in text
    for line in report.commands:
        assert f"\n{line}\n" in text
    for line in (
        "- fp16: this CPU has no FP16 matrix product; FP16 is computed in FP32",
        "- quality: bits_per_byte, lower is better",
        "- xz -9: 2.0571 bits per byte",
        "- torch: 2.13.0",
        "| `bf16` | 89 | 3,530 | 500 MB |",
        "| `lightning-bf16` | not installed | | |",
        "| `bf16` | 2.00 MB | 2.00 MB | 2.00 MB | 8.00 MB | 4.10 kB | 34.0 MB | 110 MB |",
    ):
        assert f"{line}\n" in text
    assert text.endswith("```\n")


def test_the_table_of_arms(report: Report) -> None:
    section = markdown(report).partition("## Arms\n\n")[2].partition("\n\n")[0]
    head, _, *rows = map(cells, section.splitlines())
    assert head == [
        "arm", "time per step", "times faster", "bytes per second", "peak memory", "memory against the baseline",
        "bytes per parameter", "bits_per_byte", "against fp32", "skipped steps",
    ]  # fmt: skip
    by_name = {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}
    assert list(by_name) == [shape.arm.name for shape in SHAPES]
    assert by_name["fp32"]["times faster"] == "1.00"
    assert by_name["fp32"]["against fp32"] == "baseline"
    assert by_name["fp32"]["time per step"].startswith("1.01 s (980 ms to 1.0")
    assert by_name["fp32"]["bytes per second"] == "2,020"
    row = by_name["bf16"]
    assert (row["peak memory"], row["memory against the baseline"]) == ("110 MB", "0.55")
    assert (row["bytes per parameter"], row["against fp32"], row["skipped steps"]) == ("14", "no worse", "0")
    assert row["times faster"].startswith("1.7")
    assert by_name["fp16"]["skipped steps"] == "2"
    assert by_name["lightning-bf16"]["against fp32"] == "not installed"
    assert set(by_name["lightning-bf16"].values()) == {"`lightning-bf16`", "not installed", ""}


@pytest.mark.parametrize("made", [Made(trials=0), Made(runs=0), Made(shapes=SHAPES[4:5])])
def test_parts_that_are_empty_are_left_out(tmp_path: Path, made: Made) -> None:
    text = markdown(assemble(made_folder(tmp_path / "made", made)))
    assert "## Arms" in text
    assert "Largest" not in text
    assert ("Memory by role" in text) == (made == Made(runs=0))
    assert "\n\n\n" not in text
