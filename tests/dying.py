"""A process that dies, or a disk that is full, at one of the calls that change the disk."""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest


class Death(BaseException):
    """What no handler of errors catches, as none runs when a process is killed."""


def fail_at(
    patch: pytest.MonkeyPatch, number: int, calls: Sequence[tuple[Any, str]], error: Callable[[], BaseException]
) -> list[str]:
    """Let the `number`-th of all `calls` from now on raise instead; return where it did, once it has."""
    numbers, failed = count(), []

    def watched(function, name):
        def call(*args, **kwargs):
            if next(numbers) == number:
                failed.append(name)
                raise error()
            return function(*args, **kwargs)

        return call

    for module, name in calls:
        patch.setattr(module, name, watched(getattr(module, name), name))
    return failed
