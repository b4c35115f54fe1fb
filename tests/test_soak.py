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


@pytest.mark.slow
def test_three_kills_lose_nothing():
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "soak.py", "--kills", "3"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| bf16 | 2 |" in result.stdout
