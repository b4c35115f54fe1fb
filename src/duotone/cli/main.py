"""The `duotone` command: its verbs, its version, and errors as one line each.

Exit codes: 0 for success, 1 for a training run that failed numerically, 2 for anything wrong with what was asked for.
"""

import sys
from typing import Annotated

import typer

from duotone import __version__
from duotone.cli.formats import formats_command
from duotone.cli.train import train_command
from duotone.errors import DuotoneError

app = typer.Typer(
    name="duotone",
    help="Mixed precision training: 16-bit speed and memory, FP32 accuracy, nothing lost in silence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train_command)
app.command("formats")(formats_command)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"duotone {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line, printing an error of Duotone's as one line."""
    try:
        app()
    except DuotoneError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1 if isinstance(error, ArithmeticError) else 2)


if __name__ == "__main__":
    main()
