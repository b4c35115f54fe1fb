"""A task whose mistakes are one sentence each: which of its functions failed, in which file and line, and how.

For the command line. Whoever writes Python sees the error itself, and `duotone.compare` makes it a row of its report.
"""

import math
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from duotone.errors import DuotoneError, TaskError
from duotone.torch.internals.compiler import is_compiler_error
from duotone.train.task import Task, first_line

# where no line of a user's is
_LIBRARIES = (
    Path(__file__).parents[1],
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")),
)
_END = object()


def guarded(task: Task) -> Task:
    """Return a task that raises TaskError for whatever its functions raise, KeyboardInterrupt apart.

    >>> task = Task("mine", torch.nn.Linear(1, 1), lambda model, x: model(x).mean() / 0, lambda _: [], lambda _: {})
    >>> guarded(task).loss(task.model, None)
    Traceback (most recent call last):
    duotone.errors.TaskError: the loss of task 'mine' failed: TypeError: linear(): argument 'input' ...
    """

    def batches(generator: torch.Generator) -> Iterator[Any]:
        with _blaming(task, "batches"):
            iterator = iter(task.batches(generator))
        while True:
            with _blaming(task, "batches"):
                batch = next(iterator, _END)
            if batch is _END:
                return
            yield batch

    def units_in(batch: Any) -> Any:
        units: Any = _guarded(task, "units_in")(batch)
        if isinstance(units, bool) or not isinstance(units, int | float) or not 0 <= units < math.inf:
            raise TaskError(f"units_in of task {task.name!r} returned {units!r:.60}; it must return a number of units")
        return units

    functions = {"loss": _guarded(task, "loss"), "evaluate": _guarded(task, "evaluate")}
    return replace(task, batches=batches, units_in=units_in, **functions)


def _guarded(task: Task, name: str) -> Callable[..., Any]:
    function = getattr(task, name)

    def call(*arguments: Any) -> Any:
        with _blaming(task, name):
            return function(*arguments)

    return call


@contextmanager
def _blaming(task: Task, name: str) -> Iterator[None]:
    try:
        yield
    except (DuotoneError, KeyboardInterrupt):
        raise
    except BaseException as error:
        line = first_line(error)
        # what follows from the end of another rank is not the task's
        if isinstance(error, dist.DistError) or "gloo" in line:
            raise
        if is_compiler_error(error):
            raise TaskError(
                f"the model of task {task.name!r} cannot be compiled as one graph: {line}; mend that (duotone "
                "--traceback shows where it is), or train without --compile"
            ) from error
        where = f" in {place}" if (place := _place(error)) else ""
        kind = f"{type(error).__name__}: {line}" if line else type(error).__name__
        raise TaskError(
            f"the {name} of task {task.name!r} failed{where}: {kind}; mend it there (duotone --traceback shows the way)"
        ) from error


def _place(error: BaseException) -> str:
    """Return the file and line of the last code that is neither Duotone's nor a library's, or nothing."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_absolute() and not any(path.is_relative_to(library) for library in _LIBRARIES):
            here = Path.cwd()
            return f"{path.relative_to(here) if path.is_relative_to(here) else path}, line {frame.lineno}"
    return ""
