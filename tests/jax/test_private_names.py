"""No private name of JAX outside of `duotone.jax.internals`."""

import ast
from pathlib import Path

import pytest

import duotone.jax

SOURCE = Path(duotone.jax.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.name != "internals.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_private_module_is_imported_and_no_version_is_asked_for(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            foreign = parts[0] in ("jax", "jnp", "lax", "optax", "flax", "equinox")
            assert not (foreign and any(part.startswith("_") and not part.startswith("__") for part in parts)), name
            assert not (foreign and "__version" in name), name
