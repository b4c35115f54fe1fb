"""First light on a GPU: stages run on a CPU, a hang ends one alone, and README has the table of their results."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    return gpu


def test_a_stage_that_hangs_ends_alone_and_what_it_wrote_is_read(gpu, tmp_path, monkeypatch):
    program = tmp_path / "gpu_stages.py"
    program.write_text(
        "import sys, time\n"
        "name, out = sys.argv[1:3]\n"
        'open(out + \'/gpu.jsonl\', \'a\').write(\'{"stage": "\' + name + \'", "what": "begun"}\\n{"cut\')\n'
        "time.sleep(60 if name == 'bits' else 0)\n"
        "sys.exit(name == 'graph')\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
    stages = [stage._replace(seconds=2) for stage in gpu.STAGES if stage.name in ("bits", "launches", "graph")]
    begun = time.monotonic()
    rows = gpu.run(stages, tmp_path, 30, is_dry=False)
    assert time.monotonic() - begun < 20
    assert [row["exit"] for row in rows] == ["ended after 2 s", 0, 1]
    # the line that was cut off swallows what another process wrote behind it
    assert {"stage": "bits", "what": "begun"} in gpu.read(tmp_path)
    assert "| bits | ended after 2 s |" in gpu.table(rows, gpu.read(tmp_path))
    assert [row["exit"] for row in gpu.run(stages, tmp_path, 4, is_dry=False)] == ["no time was left"] * 3


def test_readmes_table(gpu):
    machine = {"date": "2026-12-01", "gpu": "Some GPU", "torch": "2.13.0", "python": "3.11.7"}
    arm = {"stage": "gpt", "what": "torch.amp bf16", "tokens_per_second": 1000, "peak_bytes": 2e9}
    records = [{"stage": "environment", "what": "versions", **machine}, arm]
    records.append({**arm, "what": "duotone bf16", "tokens_per_second": 1250})
    shown = gpu.readme_table({"records": records})
    assert "| `duotone bf16` | 1,250 | 1.25 | 2.0 |" in shown
    assert "on an Some GPU, torch 2.13.0" in shown


def test_readme_says_what_was_measured(gpu):
    text = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- gpu: begin -->\n")[1].split("<!-- gpu: end -->")[0]
    )
    path = ROOT / "benchmarks" / "results" / "gpu.json"
    if path.exists():
        assert text == gpu.readme_table(json.loads(path.read_text(encoding="utf-8")))
    else:
        assert "Nothing has been measured on a GPU yet" in text


def test_limits_add_up(gpu):
    assert sum(stage.seconds for stage in gpu.STAGES if stage.in_short) <= gpu.TOTAL_SHORT * 1.25
    assert gpu.TOTAL <= 360
    assert gpu.TOTAL_SHORT <= 240


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert run.returncode == 0, run.stdout[-5000:]
    assert "failed" not in (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").replace('"failed": []', "")
