"""The `duotone` command: its verbs, its version, and everything that goes wrong as one line each.

Exit codes: 0 for success, 1 for a training run that failed numerically or an arm of a comparison that failed, 2 for
anything wrong with what was asked for or with what it needs, a full disk for one; and 128 and a signal's number for a
run that a signal stopped: 129 for SIGHUP, 130 for Ctrl-C, 143 for SIGTERM, and 141 where nobody reads the output. A
traceback, with exit code 1, is a defect of Duotone's.
"""

import errno
import os
import sys
import warnings
from contextlib import suppress
from traceback import print_exc
from typing import Annotated

import typer

from duotone import __version__
from duotone.cli.commands import Verb, Verbs
from duotone.cli.compare import compare_command
from duotone.cli.explain import explain_command
from duotone.cli.export import export_command
from duotone.cli.formats import formats_command
from duotone.cli.one_voice import exit_code_of
from duotone.cli.ops import ops_command
from duotone.cli.thread_waiting import wait_briefly
from duotone.cli.train import TrainCommand, train_command
from duotone.cli.usage import UsageError, usage_message
from duotone.errors import DuotoneError

_TRACEBACK = "--traceback"
# what is shown of a message at most: its beginning and its end
_MOST_LETTERS = 2000

app = typer.Typer(
    name="duotone",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", cls=TrainCommand)(train_command)
app.command("compare", cls=Verb)(compare_command)
app.command("explain", cls=Verb)(explain_command)
app.command("export", cls=Verb)(export_command)
app.command("formats", cls=Verb)(formats_command)
app.command("ops", cls=Verb)(ops_command)


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
    traceback: Annotated[
        bool, typer.Option(_TRACEBACK, metavar="", help="Show where in the code an error comes from.")
    ] = False,
) -> None:
    """Mixed precision training: 16-bit speed and memory, FP32 accuracy, nothing lost in silence."""


def main() -> None:
    """Run the command line, and exit; an error of Duotone's, or a warning of anybody's, is one line."""
    warnings.showwarning = _show_warning
    # before a verb imports torch, which reads it
    wait_briefly(os.environ)
    _open_streams()
    code = _run()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _failed_output(error)
    sys.exit(code)


def _run() -> int:
    """Run the command line, and return the exit code."""
    # not by `app()`: it ends the process at a broken pipe, and prints mistakes in boxes
    command = typer.main.get_command(app)
    try:
        with command.make_context("duotone", sys.argv[1:]) as context:
            command.invoke(context)
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("stopped by Ctrl-C; nothing was begun")
        return 130
    except (DuotoneError, UsageError, OSError, MemoryError) as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    """Say what is wrong, and return the exit code."""
    if isinstance(error, DuotoneError):
        _fail(error)
        return exit_code_of(error)
    if isinstance(error, OSError):
        return _failed_output(error)
    if isinstance(error, MemoryError):
        _fail(f"memory ran out{f': {error}' if str(error) else ''}; give less to do, or more memory")
    # without arguments help was shown, which is no error's message
    elif type(error).__name__ != "NoArgsIsHelpError":
        _fail(usage_message(error))
    return 2


def _failed_output(error: OSError) -> int:
    """Say why something could not be written or read, and return the exit code; where nobody reads, say nothing."""
    # what is left in the buffer would be tried again at the very end
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        return 141
    what = f"use {error.filename}" if error.filename is not None else "write the output"
    _fail(f"cannot {what}: {error.strerror or error}; mend that, and do it again")
    return 2


def _open_streams() -> None:
    """Have output and errors somewhere to go, and no letter that their encoding lacks end anything."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # a file that is opened later would take the number of a closed stream, and what it prints
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _show_warning(message: Warning | str, *_: object) -> None:
    _say(f"note: {_one_line(message)}")


def _fail(message: object) -> None:
    if _TRACEBACK in sys.argv:
        print_exc()
    _say(f"error: {_one_line(message)}")


def _say(line: str) -> None:
    # not typer.echo: a progress bar redirects sys.stderr and prints this above itself
    with suppress(OSError):
        sys.stderr.write(f"{line}\n")


def _one_line(message: object) -> str:
    """Return a message as one line, without what a terminal would obey, and of a very long one the ends."""
    line = " ".join(str(message).split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    half = _MOST_LETTERS // 2
    return line if len(line) <= _MOST_LETTERS else f"{line[:half]} ... {line[-half:]}"


if __name__ == "__main__":
    main()
