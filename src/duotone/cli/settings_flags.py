"""Flags of the command line for a run's settings: types, defaults and help are those of `RunSettings`."""

import inspect
import re
from collections.abc import Callable
from dataclasses import Field, fields
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from duotone.policy import Policy
from duotone.run_settings import RunSettings, value_of_text

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
            texts = {field.name: arguments.pop(field.name, None) for field in chosen}
            given = {
                field.name: _value(texts[field.name], field.type) for field in chosen if texts[field.name] is not None
            }
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


def _value(given: Any, kind: Any) -> Any:
    """Return a setting's value for what Typer gives, texts: `RunSettings` says what is wrong with one, in one voice."""
    if isinstance(given, tuple):
        return tuple(value_of_text(text, each) for text, each in zip(given, get_args(kind), strict=True))
    return value_of_text(given, kind) if isinstance(given, str) else given


def _parameter(field: Field[Any], text: str, panel: str | None) -> inspect.Parameter:
    default: Any = field.default
    taken: Any = str
    if isinstance(default, tuple):
        taken, default = tuple[str, str], " ".join(map(str, default))
    elif field.type is Policy:
        default = default.name
    elif field.type is bool:
        taken, default = bool, str(default).lower()
    text = f"{text} (default: {default})"
    if field.name == "task":
        option = typer.Argument(help=text, show_default=False, metavar="TASK")
    else:
        flags = (f"--{field.name.replace('_', '-')}", *_SHORT_FLAGS.get(field.name, ()))
        option: Any = typer.Option(*flags, help=text, rich_help_panel=panel, metavar=_metavar(field.type))
    annotation = Annotated[taken | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(kind: Any) -> str:
    """Return how help shows a setting's type.

    >>> _metavar(Literal["ddp", "fsdp"]), _metavar(float | None), _metavar(tuple[float, float])
    ('ddp|fsdp', 'float|none', 'float float')
    """
    if kind is bool:
        return ""
    names = {int: "int", float: "float", str: "text", Policy: "policy", NoneType: "none"}
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    between = " " if get_origin(kind) is tuple else "|"
    return between.join(names[each] for each in get_args(kind) or (kind,))
