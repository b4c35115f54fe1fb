"""Warnings that name the line of the user's program, however many frames of torch's and ours lie between."""

import sys
import warnings
from collections.abc import Iterable

from duotone.errors import DuotoneWarning


def warn(message: str, between: Iterable[str] = ()) -> None:
    """Give a `DuotoneWarning` from the nearest line that is neither torch's nor Duotone's.

    Args:
        message: what is said.
        between: the names of other packages that may lie between.
    """
    skipped = {"duotone", "torch", *between}
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in skipped:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DuotoneWarning, stacklevel=level)
