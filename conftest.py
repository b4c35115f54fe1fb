"""Without JAX, what needs it is not collected, and the header says so."""

from importlib.util import find_spec
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_NEEDS_JAX = (_HERE / "tests" / "jax", _HERE / "src" / "duotone" / "jax")
_HAS_JAX = find_spec("jax") is not None and find_spec("optax") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Pass over the tests of duotone.jax where there is no JAX."""
    return True if not _HAS_JAX and collection_path in _NEEDS_JAX else None


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say that they were passed over."""
    return None if _HAS_JAX else "there is no JAX here: tests/jax is left to make test-jax"
