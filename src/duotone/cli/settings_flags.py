"""Flags of the command line for a run's settings: types, defaults and help are those of `RunSettings`."""

import inspect
import re
from collections.abc import Callable
from dataclasses import Field, fields
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from duotone.policy import Policy
from duotone.run_settings import RunSettings

Command = Callable[..., None]

_SHORT_FLAGS = {"learning_rate": ("--lr",)}
# which source of a setting decides, the first that has it
_PANEL = "Settings: flag, else --config, else task, else default"


def with_settings(*names: str) -> Callable[[Command], Command]:
    """Give a command flags for settings, and an argument for the task, in front of its own flags.

    Args:
        names: of the settings; none for all. The command takes those that were given as a dict, its first argument.

    >>> command = with_settings()(lambda given, out: print(given, out))
    >>> command(steps=3, clip_norm="none", out="run")
    {'steps': 3, 'clip_norm': None} run
    """
    chosen = [field for field in fields(RunSettings) if not names or field.name in names]

    def decorate(command: Command) -> Command:
        def run(**arguments: Any) -> None:
            values = {field.name: arguments.pop(field.name, None) for field in chosen}
            given = {name: None if value == "none" else value for name, value in values.items() if value is not None}
            command(given, **arguments)

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        texts, panel = _texts(), None if names else _PANEL
        parameters = [*(_parameter(field, texts.get(field.name, ""), panel) for field in chosen), *own]
        # Typer makes a command's flags from these
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__doc__ = command.__doc__
        return run

    return decorate


def _texts() -> dict[str, str]:
    """Return what the docstring of `RunSettings` says of each attribute."""
    section = re.search(r"Attributes:\n(.*?)\n\n", inspect.getdoc(RunSettings) or "", re.DOTALL)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _parameter(field: Field[Any], text: str, panel: str | None) -> inspect.Parameter:
    kind: Any = field.type
    default: Any = field.default
    shown: dict[str, Any] = {}
    if get_origin(kind) is Literal:
        # `RunSettings` names the nearest choice, which Typer would not
        kind, shown = str, {"metavar": "|".join(get_args(kind))}
    elif kind is Policy:
        kind, shown, default = str, {"metavar": "policy"}, default.name
    elif NoneType in get_args(kind):
        kind, shown = Any, {"metavar": "float|none", "parser": _number_or_none}
    elif isinstance(default, tuple):
        default = " ".join(map(str, default))
    text = f"{text} (default: {default})"
    if field.name == "task":
        option = typer.Argument(help=text, show_default=False)
    else:
        flags = (f"--{field.name.replace('_', '-')}", *_SHORT_FLAGS.get(field.name, ()))
        option: Any = typer.Option(*flags, help=text, rich_help_panel=panel, **shown)
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _number_or_none(text: str) -> float | str:
    return "none" if text == "none" else float(text)
