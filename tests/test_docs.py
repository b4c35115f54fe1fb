"""README and docs: every example runs as it stands there, commands run with fewer steps, links lead somewhere."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import duotone.torch
from duotone.cli.main import main

from .code_blocks import code_blocks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
NOTEBOOK = ROOT / "docs" / "first-steps.ipynb"


def blocks(language: str) -> list[tuple[str, str]]:
    """Return every block of a language as where it stands, its page and line, and its text."""
    return [block for page, text in TEXTS.items() for block in code_blocks(page.name, text, language)]


# tests/jax and tests/keras run those of the pages on JAX and Keras
OTHERS = ("jax.md", "keras.md")
EXAMPLES = {where: text for where, text in blocks("python") if not where.startswith(OTHERS)}
COMMANDS = {
    f"{where} {line.split('#')[0].strip()}": shlex.split(line, comments=True)
    for where, block in blocks("bash")
    for line in block.splitlines()
    if line.strip()
}
COMPARISONS = [command[1:] for command in COMMANDS.values() if command[:2] == ["duotone", "compare"]]


@pytest.mark.parametrize("where", EXAMPLES)
def test_an_example_runs(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[where], where, "exec"), {"__name__": "__main__"})


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    namespace = {"__name__": "__main__"}
    for number, source in enumerate(code):
        exec(compile(source, f"{NOTEBOOK.name}[{number}]", "exec"), namespace)
    # what it shows was printed by the code that stands there
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize(
    "name", [name for name, command in COMMANDS.items() if command[0] == "duotone" and command[1] != "compare"]
)
def test_a_command_runs(name, tmp_path, monkeypatch, capsys):
    command = COMMANDS[name][1:]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if command[0] == "train" and "--print-config" not in command:
        # the default task in its smallest size, and a few steps
        names_task = len(command) > 1 and not command[1].startswith("-")
        command = [*command, "--steps", "2", *([] if names_task else ["stdlib-text:tiny"])]
    monkeypatch.setattr(sys, "argv", ["duotone", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert capsys.readouterr().out


@pytest.mark.slow
def test_the_comparisons_run_one_after_the_other(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    flags = {part for command in COMPARISONS for part in command}
    assert flags >= {"--arms", "--arm", "--steps", "--fit-memory", "--show"}
    for command in COMPARISONS:
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


def test_the_collapse_is_what_the_example_prints(capsys):
    page = ROOT / "docs" / "loss-scaling.md"
    example = next(block for where, block in EXAMPLES.items() if page.name in where and "LossScaleCollapse" in block)
    shown = next(block for where, block in blocks("text") if page.name in where and "steps in a row" in block)
    exec(compile(example, page.name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.split() == shown.split()


def test_the_commands_of_make_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    in_readme = [command[1] for name, command in COMMANDS.items() if "README" in name and command[0] == "make"]
    assert in_readme == ["train", "test"]
    for command in COMMANDS.values():
        assert command[0] in ("make", "duotone", "torchrun")
        for target in command[1:] if command[0] == "make" else ():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), command


def test_no_example_was_missed():
    assert len(EXAMPLES) == sum(text.count("```python") for page, text in TEXTS.items() if page.name not in OTHERS)
    assert sum("README" in where for where in EXAMPLES) >= 2


def test_readme_is_one_page():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if not link.startswith(("https://", "#")):
            path, _, anchor = link.partition("#")
            target = page.parent / path
            assert target.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, link


def test_every_page_is_in_the_index():
    listed = TEXTS[ROOT / "docs" / "index.md"].split("```{toctree}")[1:]
    names = {line.strip() for block in listed for line in block.splitlines()}
    assert {page.stem for page in (ROOT / "docs").glob("*") if page.suffix in (".md", ".ipynb")} - {"index"} <= names


def test_every_public_name_has_a_line_in_the_api():
    section = TEXTS[ROOT / "docs" / "api.md"].partition("\n## `duotone.torch`\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| \S.* \|$", section, re.MULTILINE)
    assert sorted(rows) == sorted(duotone.torch.__all__)
    assert len(rows) <= 31


@pytest.mark.parametrize(
    "name", ["average", "busy", "evidence", "step", "casting", "overhead", "jax_casting", "jax_compiled"]
)
def test_the_tables_are_those_of_the_results(monkeypatch, name):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module(name)
    results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert benchmark.tables(results) in TEXTS[ROOT / "docs" / "evidence.md"]
    if name == "evidence":
        table = benchmark.summary(results)
        assert table in TEXTS[ROOT / "README.md"]
        assert table.count("| `") - 1 <= 8
