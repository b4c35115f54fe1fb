"""Every example in README runs as it stands there; its commands run with fewer steps."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_a_python_example_runs(block, tmp_path):
    result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "duotone" and c[1] != "compare"], ids=" ".join)
def test_a_command_runs(command, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    few = ["--steps", "2"] if command[1] == "train" and "--print-config" not in command else []
    result = subprocess.run(
        [sys.executable, "-m", "duotone.cli.main", *command[1:], *few],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.slow
def test_the_comparisons_run_one_after_the_other(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [command[1:] for command in COMMANDS if command[:2] == ["duotone", "compare"]]
    assert {part for command in commands for part in command} >= {
        "--arms",
        "--arm",
        "--steps",
        "--fit-memory",
        "--show",
    }
    for command in commands:
        if "--show" in command:
            made = sorted((tmp_path / "comparisons").iterdir())[0]
            arguments = [str(made) if part.startswith("comparisons/") else part for part in command]
        else:
            # the same with a smaller task where none is named, fewer runs, and less to fit
            arguments = ["200MB" if part == "2GB" else part for part in command if part not in ("--steps", "300")]
            names_task = len(command) > 1 and not command[1].startswith("-")
            arguments += ["--steps", "4", "--seeds", "1", *([] if names_task else ["stdlib-text:tiny"])]
        result = subprocess.run(
            [sys.executable, "-m", "duotone.cli.main", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        # a peer that is not installed is a row, and the exit code says so
        expected = (0, 1) if any("peers" in part for part in command) else (0,)
        assert result.returncode in expected, result.stdout + result.stderr
        assert "report.html" in result.stdout


def test_the_collapse_is_what_the_example_prints():
    example = next(block for block in PYTHON_BLOCKS if "LossScaleCollapse" in block)
    shown = next(block for block in re.findall(r"```text\n(.*?)```", README, re.DOTALL) if "steps in a row" in block)
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", example], capture_output=True, text=True, check=True)
    assert result.stdout.split() == shown.split()


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [command[1] for command in COMMANDS if command[0] == "make"]
    assert targets == ["train", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_no_example_was_missed():
    assert len(PYTHON_BLOCKS) == README.count("```python")
    assert len(PYTHON_BLOCKS) >= 4
    # what torchrun starts is tested with the command line
    assert {command[0] for command in COMMANDS} == {"make", "duotone", "torchrun"}


@pytest.mark.parametrize("name", ["evidence", "step", "casting"])
def test_the_tables_are_those_of_the_results(monkeypatch, name):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module(name)
    results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert benchmark.tables(results) in README
