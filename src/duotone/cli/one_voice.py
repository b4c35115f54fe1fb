"""Several ranks speak as one: rank 0 gives warnings, and an error that ends all of them is printed once."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from duotone.errors import DuotoneError

if TYPE_CHECKING:
    from duotone.train import Group


def exit_code_of(error: Exception) -> int:
    """Return the exit code of a run that an error ends: 2 for what was asked for, 1 for numbers and for bugs."""
    return 2 if isinstance(error, DuotoneError) and not isinstance(error, ArithmeticError) else 1


@contextmanager
def one_voice(ranks: "Group") -> Iterator[None]:
    """Have a block's warnings and errors come from one rank only; alone, nothing changes.

    A rank that has nothing to say of the error that ends it exits with the error's code. Of an error that comes on a
    rank other than 0 alone, that rank says its number.
    """
    shows = warnings.showwarning
    if ranks.rank:
        warnings.showwarning = lambda *_, **__: None
    try:
        yield
    except typer.Exit:
        raise
    except Exception as raised:
        error = ranks.readable(raised)
        if not ranks.prints(error):
            raise SystemExit(exit_code_of(error)) from error
        if ranks.rank and isinstance(error, DuotoneError):
            raise type(error)(f"rank {ranks.rank}: {error}") from raised
        if ranks.rank:
            error.add_note(f"on rank {ranks.rank}")
        raise error from raised if error is not raised else raised.__cause__
    finally:
        warnings.showwarning = shows
