"""What the verbs print tables and lines on: Rich's console, which leaves a broken pipe to whoever runs the command."""

import errno
from typing import Any

from rich.console import Console


class Output(Console):
    """The standard output, without colours of its own for numbers and paths.

    >>> Output(quiet=True).print("nothing")
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Raise what was caught: Rich would end the process at once, and a run unsaved."""
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
