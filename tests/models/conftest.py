"""Collected only where the mark asks for it: even the import of these libraries takes seconds."""

import re
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out everything here unless -m names models."""
    is_asked_for = re.search(r"(?<!not )\bmodels\b", config.getoption("markexpr"))
    # what stands beside the tests has no examples to run
    return None if is_asked_for and (collection_path.is_dir() or collection_path.name.startswith("test_")) else True
