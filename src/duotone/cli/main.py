"""The `duotone` command: its verbs, its version, and errors as one line each.

Exit codes: 0 for success, 1 for a training run that failed numerically or an arm of a comparison that failed, 2 for
anything wrong with what was asked for or with what it needs, a full disk for one, 130 and 143 for a run that Ctrl-C or
SIGTERM stopped.
"""

import sys
import warnings
from typing import Annotated

import typer

from duotone import __version__
from duotone.cli.compare import compare_command
from duotone.cli.explain import explain_command
from duotone.cli.export import export_command
from duotone.cli.formats import formats_command
from duotone.cli.one_voice import exit_code_of
from duotone.cli.ops import ops_command
from duotone.cli.train import TrainCommand, train_command
from duotone.errors import DuotoneError

app = typer.Typer(
    name="duotone",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train", cls=TrainCommand)(train_command)
app.command("compare")(compare_command)
app.command("explain")(explain_command)
app.command("export")(export_command)
app.command("formats")(formats_command)
app.command("ops")(ops_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"duotone {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Mixed precision training: 16-bit speed and memory, FP32 accuracy, nothing lost in silence."""


def main() -> None:
    """Run the command line, printing an error of Duotone's, or a warning of anybody's, as one line."""
    warnings.showwarning = _show_warning
    try:
        app()
    except DuotoneError as error:
        typer.echo(f"error: {_one_line(error)}", err=True)
        sys.exit(exit_code_of(error))


def _show_warning(message: Warning | str, *_: object) -> None:
    # not typer.echo: a progress bar redirects sys.stderr and prints this above itself
    sys.stderr.write(f"note: {_one_line(message)}\n")


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


if __name__ == "__main__":
    main()
