"""Warnings that name the user's line, however many frames of Keras', its backend's and ours lie between."""

import sys
import warnings

from duotone.errors import DuotoneWarning

_BETWEEN = {"duotone", "keras", "tensorflow", "jax", "torch"}


def warn(message: str) -> None:
    """Give a `DuotoneWarning` from the nearest line that is neither Keras', nor a backend's, nor Duotone's."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DuotoneWarning, stacklevel=level)
