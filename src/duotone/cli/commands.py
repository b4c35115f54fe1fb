"""How the commands of Typer are made here: help by `-h` too, whose line shows no type."""

from typing import Any

from typer.core import TyperCommand, TyperGroup


class Verb(TyperCommand):
    """A verb of the command line."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option that shows help, as a flag without a value."""
        return _as_flag(super().get_help_option(ctx))


class Verbs(TyperGroup):
    """All of them."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option that shows help, as a flag without a value."""
        return _as_flag(super().get_help_option(ctx))


def _as_flag(option: Any) -> Any:
    if option is not None:
        option.metavar = ""
    return option
