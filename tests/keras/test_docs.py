"""docs/keras.md: every example runs as it stands there, tables are those of the results, names are in the API."""

import importlib
import json
import re
from pathlib import Path

import pytest

import duotone.keras as dk

from ..code_blocks import code_blocks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "keras.md").read_text(encoding="utf-8")
EXAMPLES = dict(code_blocks("keras.md", PAGE, "python"))


def _param(where: str) -> object:
    # a loop that names a framework is for Keras on that one; what stands before Duotone comes in is for comparison
    named = re.findall(r"^import (tensorflow|jax|torch)\b", EXAMPLES[where], re.MULTILINE)
    marks = [pytest.mark.backends(*named)] if named else []
    return pytest.param(where, marks=marks if "duotone" in EXAMPLES[where] else [*marks, pytest.mark.slow])


@pytest.mark.parametrize("where", [_param(where) for where in EXAMPLES])
def test_an_example_runs(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[where], where, "exec"), {"__name__": "__main__"})


def test_no_example_was_missed() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") >= 8
    for backend in ("tensorflow", "jax", "torch"):
        assert any(re.search(rf"^import {backend}\b", text, re.MULTILINE) for text in EXAMPLES.values())


def test_one_line_changes_for_those_who_have_mixed_float16() -> None:
    before, after = list(EXAMPLES.values())[:2]
    added = set(after.splitlines()) - set(before.splitlines())
    assert len([line for line in added if not line.startswith("import")]) == 1
    assert len(set(before.splitlines()) - set(after.splitlines())) == 1


def test_the_table_of_faults_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("keras_faults")
    results = json.loads((ROOT / "benchmarks" / "results" / "keras_faults.json").read_text(encoding="utf-8"))
    assert benchmark.tables(results) in PAGE


def test_every_public_name_has_a_line_in_the_api() -> None:
    section = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").partition("\n## `duotone.keras`\n")[2]
    rows = re.findall(r"^\| `(\w+)` \| \S.* \|$", section.partition("\n## ")[0], re.MULTILINE)
    assert sorted(rows) == sorted(dk.__all__)
