"""Values on the command line besides a run's settings: numbers and paths, with errors that say what was got."""

from pathlib import Path

import typer


def whole_number(text: str) -> int:
    """Return a whole number.

    Raises:
        BadParameter: it is none.

    >>> whole_number("12")
    12
    """
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f'is "{text:.60}"; it must be a whole number') from None


def number(text: str) -> float:
    """Return a number.

    Raises:
        BadParameter: it is none.

    >>> number("1e-3")
    0.001
    """
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f'is "{text:.60}"; it must be a number') from None


def path_value(text: str) -> Path:
    """Return a path.

    Raises:
        BadParameter: the text is empty, which would mean the current folder.

    >>> path_value("runs/one").name
    'one'
    """
    if not text:
        raise typer.BadParameter("is empty; it must name a file or a folder")
    return Path(text)
