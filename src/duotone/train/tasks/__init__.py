"""The tasks that come with Duotone, and how any task is named: `digits`, `digits:convnet`, `folder/mine.py`.

A task's module is imported when the task is built, so listing them costs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType

from duotone.errors import TaskError, nearest_names
from duotone.train.task import Task, load_task_file


@dataclass(frozen=True)
class BuiltIn:
    """Where a built-in task is built, what it is in a few words, and its variants, the default first."""

    module: str
    function: str
    summary: str
    variants: tuple[str, ...]


BUILT_IN: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "stdlib-text": BuiltIn(
            "duotone.train.tasks.stdlib_text",
            "stdlib_text",
            "a GPT on the source of Python's standard library, byte by byte",
            ("small", "tiny", "base", "medium"),
        ),
        "digits": BuiltIn(
            "duotone.train.tasks.digits",
            "digits",
            "a classifier of handwritten digits",
            ("mlp", "convnet", "sgd", "small-gradients"),
        ),
    }
)


def built_in_task(text: str) -> Task:
    """Build the task called `name` or `name:variant`.

    Raises:
        TaskError: if there is no such task or variant, or its data are missing.

    >>> built_in_task("stdlib-text:tiny").unit
    'bytes'
    >>> built_in_task("digit")
    Traceback (most recent call last):
    duotone.errors.TaskError: there is no task 'digit'; did you mean digits? (a file's name must end in .py)
    """
    name, *variant = text.split(":", maxsplit=1)
    if name not in BUILT_IN:
        hint = nearest_names(name, BUILT_IN)
        raise TaskError(f"there is no task {name!r}; {hint} (a file's name must end in .py)")
    entry = BUILT_IN[name]
    return getattr(import_module(entry.module), entry.function)(*variant)


def find_task(text: str) -> Task:
    """Return the task of a file if `text` ends in .py, and the built-in task of that name otherwise."""
    return load_task_file(text) if text.endswith(".py") else built_in_task(text)
