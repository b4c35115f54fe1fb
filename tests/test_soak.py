"""The soak finds what it looks for, and a short one passes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import soak

    return soak


def test_every_difference_is_found(soak):
    whole = {"step-7/a": b"123", "metrics of line 0": {"step": 1, "loss": 0.5}}
    assert soak.differences(dict(whole), whole) == []
    assert soak.differences({**whole, "step-7/a": b"124"}, whole) == ["step-7/a"]
    assert soak.differences({**whole, "metrics of line 0": {"step": 1, "loss": 0.25}}, whole) == ["metrics of line 0"]
    assert soak.differences({**whole, "more": None}, whole) == ["more"]
    assert soak.differences({"step-7/a": b"123"}, whole) == ["metrics of line 0"]


def test_the_report_is_a_table(soak):
    lines = soak.report([soak.Tally("fp16", kills=3, lost=1)]).splitlines()
    assert lines[0].startswith("| policy | kills |")
    assert lines[2] == "| fp16 | 3 | 0 | 0 | 0 | 0 | 0 | 1 |"


def test_the_order_of_a_header_is_no_difference(soak, tmp_path):
    def file(name: str, header: str, data: bytes) -> Path:
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
        return path

    first = soak._content(file("first", '{"a":1,"b":2}', b"12"))
    assert soak._content(file("other order", '{"b":2,"a":1}', b"12")) == first
    assert soak._content(file("other value", '{"a":1,"b":3}', b"12")) != first
    assert soak._content(file("other data", '{"a":1,"b":2}', b"13")) != first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "row"), [(("--kills", "3"), "| bf16 | 2 |"), (("--kills", "3", "--ranks", "2"), "| bf16 fsdp | 2 |")]
)
def test_three_kills_lose_nothing(arguments, row):
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert row in result.stdout
