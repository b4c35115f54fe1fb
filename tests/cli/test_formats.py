"""The verb `formats`, run as a user would."""

import json

import pytest
import typer
from typer.testing import CliRunner

from duotone.cli.formats import formats_command
from duotone.formats import FORMATS


def run(*arguments: str, columns: int = 80) -> str:
    app = typer.Typer()
    app.command()(formats_command)
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_table_is_whole_at_80_columns() -> None:
    output = run()
    assert max(map(len, output.splitlines())) <= 80
    assert "…" not in output
    rows = {tuple(line.split()) for line in output.splitlines()}
    assert ("FP32", "1+8+23", "3.4028e+38", "2^-126", "2^-149", "2^-23", "7.2", "1") in rows
    assert ("FP16", "1+5+10", "65504", "2^-14", "2^-24", "2^-10", "3.3", "0.5") in rows
    assert ("FP8", "E8M0", "0+8+0", "2^127", "2^-127", "none", "2^0", "0.3", "0.25") in rows


def test_table_says_what_each_format_is_for() -> None:
    # wide enough that no sentence wraps
    lines = run(columns=400).splitlines()
    for format in FORMATS.values():
        assert any(format.label in line and format.role in line and format.range_risk in line for line in lines)


def test_json_holds_every_property() -> None:
    def no_constant(literal: str) -> None:
        pytest.fail(f"{literal} is not JSON")

    rows = json.loads(run("--json"), parse_constant=no_constant)
    assert list(rows) == list(FORMATS)
    fp16, e8m0 = rows["float16"], rows["float8_e8m0fnu"]
    assert (fp16["storage_bits"], fp16["bias"], fp16["specials"]) == (16, 15, "inf_and_nan")
    assert (fp16["max"], fp16["epsilon"], fp16["max_exact_integer"]) == (65504, 2**-10, 2048)
    assert (e8m0["smallest_subnormal"], e8m0["signed"], e8m0["infinity_code"]) == (None, False, None)
    assert {row["role"] for row in rows.values()} == {format.role for format in FORMATS.values()}
