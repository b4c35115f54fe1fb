"""What the tests of the command line share."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from duotone.cli.main import main


@pytest.fixture
def duotone(monkeypatch, tmp_path, capsys):
    """Return a function that runs the command in an empty folder and gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = _run(monkeypatch, arguments)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def in_folder(patch: pytest.MonkeyPatch, folder: Path) -> Callable[..., tuple[int, str, str]]:
    """Return such a function for a folder that several tests share."""
    patch.chdir(folder)
    patch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = _run(patch, arguments)
        return code, output.getvalue(), errors.getvalue()

    return run


def _run(patch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> int:
    patch.setattr(sys, "argv", ["duotone", *arguments])
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0
