"""docs/errors.md has a line for every error and warning in the source, and none for what is gone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import duotone.errors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
FAMILY = {name for name, kind in vars(duotone.errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
# what torch's own GradScaler says, word for word
TORCHS = (
    "torch.cuda.amp.GradScaler is enabled",
    "GradScaler is going to stop passing",
    "Closure use is not currently supported",
    "step() has already been called",
)
# what only a defect of our own would say
OURS = ("start must be requested before",)
# letters that tell one message from another
_LEAST = 9


def pieces(node: ast.expr) -> list[str]:
    """Return the parts of a message that are the same whenever it is said."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return [str(part.value) for part in node.values if isinstance(part, ast.Constant)]
    if isinstance(node, ast.IfExp):
        return [*pieces(node.body), *pieces(node.orelse)]
    if isinstance(node, ast.BinOp):
        return [*pieces(node.left), *pieces(node.right)]
    return []


def messages() -> Iterator[tuple[str, list[str]]]:
    """Yield where an error is raised or a warning given, and the fixed parts of its message."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in {*FAMILY, "RuntimeError", "warn"}:
                    fixed = [text for text in pieces(node.args[0]) if len(text) >= _LEAST]
                    if fixed and not any(text.startswith((*TORCHS, *OURS)) for text in fixed):
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", fixed


def quoted() -> list[str]:
    return [" ".join(text.split()) for text in re.findall(r"\*\*`(.*?)`\*\*", PAGE, re.DOTALL)]


def test_what_is_quoted_is_enough_to_search_for():
    assert [fragment for fragment in quoted() if len(fragment) < _LEAST] == []


def test_every_error_and_warning_has_its_line():
    fragments = quoted()
    missing = [
        f"{where}: {fixed}"
        for where, fixed in messages()
        if not any(fragment in text for fragment in fragments for text in fixed)
    ]
    assert not missing, "\n".join(missing)


def test_no_line_is_of_a_message_that_is_gone():
    fixed = [text for _, texts in messages() for text in texts]
    assert [fragment for fragment in quoted() if not any(fragment in text for text in fixed)] == []


def test_every_kind_of_error_is_named():
    assert not {name for name in FAMILY - {"DuotoneWarning"} if f"`{name}`" not in PAGE}
