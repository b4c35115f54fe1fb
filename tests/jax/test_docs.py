"""docs/jax.md: every example runs as it stands there, and every name of `duotone.jax` stands in the API."""

import re
from pathlib import Path

import pytest

import duotone.jax as dj

from ..code_blocks import code_blocks

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "jax.md").read_text(encoding="utf-8")
EXAMPLES = dict(code_blocks("jax.md", PAGE, "python"))


def _param(where: str) -> object:
    # what stands before Duotone comes in is for those who compare
    return where if "duotone" in EXAMPLES[where] else pytest.param(where, marks=pytest.mark.slow)


@pytest.mark.parametrize("where", [_param(where) for where in EXAMPLES])
def test_an_example_runs(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[where], where, "exec"), {"__name__": "__main__"})


def test_no_example_was_missed() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") >= 8


def test_every_public_name_has_a_line_in_the_api() -> None:
    section = (DOCS / "api.md").read_text(encoding="utf-8").partition("\n## `duotone.jax`\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| \S.* \|$", section, re.MULTILINE)
    assert sorted(rows) == sorted(dj.__all__)
