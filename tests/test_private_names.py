"""No private name of torch outside `duotone.torch.internals`, but for what reads `torch.utils.checkpoint`."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from duotone.torch.internals import autograd, compiler, tensors, training

SOURCE = Path(__file__).parents[1] / "src" / "duotone"
FILES = sorted(SOURCE.rglob("*.py"))
AT_HOME = {
    *(SOURCE / "torch" / "internals").rglob("*.py"),
    SOURCE / "torch" / "casting" / "recomputation.py",
    SOURCE / "keras" / "internals.py",
}
# of Python's own: frames, named tuples, fields
PYTHONS = {"_getframe", "_replace", "_fields", "_asdict", "_make"}
# attributes of torch's objects, private names of Duotone's own being spelled as some of them
OF_TORCH = {
    value
    for module in (autograd, compiler, tensors, training)
    for constant, value in vars(module).items()
    if isinstance(value, str) and constant.isupper() and value.startswith("_")
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def own_names() -> frozenset[str]:
    """Return the private names that Duotone defines, and those that its GradScaler inherits from torch's."""
    names = set(training.SCALER_ATTRIBUTES) | PYTHONS
    for path in set(FILES) - AT_HOME:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                names.add(node.attr)
    return frozenset(names)


def is_self(node: ast.expr) -> bool:
    return ast.unparse(node) in ("self", "cls", "super()")


def private_names(source: str, own: frozenset[str]) -> Iterator[str]:
    """Yield what a file names that is private, and neither its own nor Duotone's."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if any(map(is_private, alias.name.split(".")))]
            yield from (name for name in found if name.startswith("torch"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if any(map(is_private, name.split("."))))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            whole = ast.unparse(node)
            if (
                whole.startswith("torch.")
                or node.attr not in own
                or (node.attr in OF_TORCH and not is_self(node.value))
            ):
                yield whole
        elif isinstance(node, ast.Constant) and node.value in OF_TORCH:
            yield str(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own:
                yield ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_private_names_of_torch_have_one_home(path: Path) -> None:
    if path not in AT_HOME:
        assert not list(private_names(path.read_text(encoding="utf-8"), own_names()))


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch import _foreach_mul_",
        "from torch.utils._pytree import tree_map",
        "torch._C._set_grad_enabled(True)",
        "x._version",
        "module._parameters['weight']",
        "getattr(optimizer, '_step_supports_amp_scaling', False)",
        "names = ('_opt_called',)",
        "torch.ops.aten._to_copy",
    ],
)
def test_a_private_name_elsewhere_is_seen(line: str) -> None:
    assert list(private_names(line, own_names()))
