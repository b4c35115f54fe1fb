"""What the tests of the command line share."""

import sys

import pytest

from duotone.cli.main import main


@pytest.fixture
def duotone(monkeypatch, tmp_path, capsys):
    """Return a function that runs the command in an empty folder and gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["duotone", *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return run
