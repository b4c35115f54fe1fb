"""Warnings that name the line of the user's program, however many frames of frameworks' and ours lie between."""

import sys
import warnings
from collections.abc import Iterable

from duotone.errors import DuotoneWarning

_LIBRARIES = frozenset({"duotone", "jax", "keras", "tensorflow", "torch"})


def warn(message: str, between: Iterable[str] = ()) -> None:
    """Give a `DuotoneWarning` from the nearest line that is neither a framework's nor Duotone's.

    Args:
        message: what is said.
        between: the names of other packages that may lie between.
    """
    skipped = _LIBRARIES.union(between)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in skipped:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DuotoneWarning, stacklevel=level)
