"""Markdown whose tables have a cell for each column, and what stands in them."""

from pathlib import Path

import pytest

from duotone.compare.report.assembly import assemble
from duotone.compare.report.markdown import ARM_COLUMNS, arm_table, markdown
from duotone.compare.report.report import Report

from .made_records import SHAPES, Made, Shape, arm, made_folder


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
    assert [len(table) for table in tables] == [9, 9, 8, 8]
    for table in tables:
        assert {len(line.split("|")) for line in table} == {len(cells(table[0])) + 2}
        assert set(table[1]) == {"|", "-", ":"}


def test_all_parts_are_there_in_their_order(report: Report) -> None:
    text = markdown(report)
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == [
        "# stdlib-text under 7 arms", "## Verdicts", "## Arms", "## Largest micro-batches",
        "## Seconds of a step, by part", "## Memory by role", "## How it was judged", "## To know",
        "## What was trained", "## Environment", "## To repeat it",
    ]  # fmt: skip
    for line in (*report.verdicts, *report.rules, *report.remarks):
        assert f"- {line}\n" in text
    for line in report.commands:
        assert f"\n{line}\n" in text
    for line in (
        "- fp16: this CPU has no FP16 matrix product; FP16 is computed in FP32",
        "- quality: bits_per_byte, lower is better",
        "- bits_per_byte of xz -9: 2.0571",
        "- torch: 2.13.0",
        "| `bf16` | 89 | 500 MB | 3,530 bytes/s |",
        "| `lightning-bf16` | not installed | | |",
        "| `bf16` | 2.00 MB | 2.00 MB | 2.00 MB | 8.00 MB | 4.10 kB | 34.0 MB |",
    ):
        assert f"{line}\n" in text
    assert text.endswith("```\n")


def test_the_table_of_arms(report: Report) -> None:
    head, _, *rows = map(cells, arm_table(report).splitlines())
    assert head == [
        "arm", "ms per step", "times faster", "peak memory", "memory against the baseline", "bytes per parameter",
        "bits_per_byte", "verdict", "skipped",
    ]  # fmt: skip
    by_name = {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}
    assert list(by_name) == [shape.arm.name for shape in SHAPES]
    assert by_name["fp32"]["times faster"] == "1.00"
    assert by_name["fp32"]["verdict"] == "baseline"
    row = by_name["bf16"]
    assert (row["peak memory"], row["memory against the baseline"]) == ("110 MB", "0.55")
    assert (row["bytes per parameter"], row["verdict"], row["skipped"]) == ("14", "no worse", "0")
    assert row["times faster"].startswith("1.7")
    assert by_name["fp16"]["skipped"] == "2"
    assert by_name["lightning-bf16"]["verdict"] == "not installed"
    assert set(by_name["lightning-bf16"].values()) == {"`lightning-bf16`", "not installed", ""}


def test_columns_can_be_chosen(report: Report) -> None:
    head, _, first, *_ = map(cells, arm_table(report, ("arm", "throughput", "summary")).splitlines())
    assert head == ["arm", "bytes per second", "how it trains"]
    assert first == ["`fp32`", "2,020", "FP32 throughout, fused AdamW"]
    assert ARM_COLUMNS[0] == "arm"
    with pytest.raises(KeyError):
        arm_table(report, ("speed",))


@pytest.mark.parametrize("made", [Made(trials=0), Made(runs=0), Made(shapes=SHAPES[4:5])])
def test_parts_that_are_empty_are_left_out(tmp_path: Path, made: Made) -> None:
    text = markdown(assemble(made_folder(tmp_path / "made", made)))
    assert "## Arms" in text
    assert "Largest" not in text
    assert ("Memory by role" in text) == (made == Made(runs=0))
    assert "\n\n\n" not in text


def test_bars_in_names_do_not_end_a_cell(tmp_path: Path) -> None:
    shapes = (SHAPES[0], Shape(arm("a|b", "duotone", "x|y", "bf16")))
    table = arm_table(assemble(made_folder(tmp_path / "made", Made(shapes=shapes))), ("arm", "summary"))
    assert table.splitlines()[-1] == "| `a\\|b` | x\\|y |"
