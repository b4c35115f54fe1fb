"""What Typer finds wrong with a command line, in the words of every other error: one line, and what to do."""

import re
import sys
from typing import Any

import typer

from duotone.errors import nearest_names

# Typer has a copy of Click from some version on, so its classes are found through one that Typer names itself
UsageError: Any = typer.BadParameter.__mro__[1]


def usage_message(error: Any) -> str:
    """Return what is wrong in one sentence.

    Args:
        error: a `UsageError`.
    """
    context = error.ctx
    path = _typed_path() if context is None else context.command_path
    see = f"see {path} --help"
    kind, text = type(error).__name__, " ".join(error.format_message().split())
    verb = re.search("No such command '(.*?)'", text)
    extra = re.search(r"unexpected extra argument\S* \((.*)\)", text)
    if kind == "NoSuchOption":
        message = f"there is no option {error.option_name}; {_near(error.option_name, _options(context), see)}"
    elif kind == "BadOptionUsage":
        message = f"{error.option_name} {_what_it_takes(text)}; {see}"
    elif kind == "MissingParameter" and error.param is not None:
        message = f"{path} needs {_name(error.param)}; {see}"
    elif isinstance(error, typer.BadParameter) and error.param is not None:
        reason = error.message if error.message.startswith("is ") else f"cannot be read: {error.message}"
        message = f"{_name(error.param)} {reason}; {see}"
    elif verb is not None and context is not None:
        message = f'there is no verb "{verb[1]}"; {_near(verb[1], context.command.commands, see)}'
    elif extra is not None:
        message = f'"{extra[1]}" is more than {path} takes; {see}'
    else:
        message = f"{text.rstrip('.')}; {see}"
    return message


def _typed_path() -> str:
    """Return the command with its verb, where Click does not say which it was."""
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return f"duotone {verb}".rstrip()


def _near(name: str, known: Any, see: str) -> str:
    hint = nearest_names(name, known)
    return hint if hint.startswith("did") else see


def _options(context: Any) -> list[str]:
    params = () if context is None else context.command.params
    return [option for param in params for option in param.opts if option.startswith("-")]


def _what_it_takes(text: str) -> str:
    """Return what an option takes, from Click's sentence.

    >>> _what_it_takes("Option '--betas' requires 2 arguments."), _what_it_takes("Option '--resume' does not take ...")
    ('needs 2 values', 'takes no value')
    """
    if "not take" in text:
        return "takes no value"
    count = re.search(r"requires (\d+) arguments", text)
    return "needs a value" if count is None else f"needs {count[1]} values"


def _name(param: Any) -> str:
    """Return how a user knows a parameter: by its flag, or as the usage line shows it."""
    flags = [option for option in param.opts if option.startswith("-")]
    return flags[0] if flags else (param.metavar or param.name).upper()
