"""The errors that Duotone raises: one family, each with the built-in base that its callers expect.

A message says what was got, what is allowed and what to do. The command line prints it as one line and exits with 2.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal


class DuotoneError(Exception):
    """Base of every error that Duotone raises on purpose."""


class DuotoneWarning(UserWarning):
    """Something works, but not in the way that was asked for; said once."""


class FormatError(DuotoneError, ValueError):
    """A number format or a rounding that does not exist, or an array that cannot be rounded."""


class PolicyError(DuotoneError, ValueError):
    """A policy that cannot be read, is impossible, or would lose updates in silence."""


class LossScaleError(DuotoneError, ValueError):
    """Loss-scale settings that are out of range or not powers of two."""


class LossScaleCollapse(DuotoneError, ArithmeticError):
    """Every step is skipped: the gradients stay non-finite although the loss scale is at its floor."""


class NonFiniteLoss(DuotoneError, ArithmeticError):
    """The loss itself is Inf or NaN, before any scaling and before the backward pass."""


class CheckpointError(DuotoneError, RuntimeError):
    """A checkpoint that is missing, damaged, of another policy, or does not fit the model.

    Attributes:
        damage: what is wrong with its files, in a few words, such as "no manifest.json"; empty if it is something else.
    """

    def __init__(self, message: str = "", *, damage: str = "") -> None:
        super().__init__(message)
        self.damage = damage


class OptimizerError(DuotoneError, ValueError):
    """An optimizer whose settings, state or gradients it cannot work with, or that lacks the masters it needs."""


class AverageError(DuotoneError, RuntimeError, ValueError):
    """An average with settings or a state it cannot have, or of another model; or one that is in the model just now."""


class BackendError(DuotoneError, RuntimeError):
    """A backend of the kernels that does not exist, or was asked for by name and does not work here."""


class OperationError(DuotoneError, RuntimeError):
    """An operation that a cast model does not run in 16 bits, or on an operand that was changed; or no such kind."""


class AutocastError(DuotoneError, RuntimeError, TypeError, ValueError):
    """An autocast for a device that has none, or of something that is no function."""


class ExplainError(DuotoneError, TypeError):
    """Something that cannot be explained, or a run that says twice what to run."""


class TaskError(DuotoneError, ValueError):
    """A training task, or a run's settings, that cannot be used."""


class FolderError(DuotoneError, RuntimeError):
    """A folder of a run or a comparison that another process writes into, or that cannot be written to."""


class CompareError(DuotoneError, ValueError):
    """A comparison that cannot be made as it was asked for, or a folder that holds none."""


class ArmError(CompareError):
    """An arm of a comparison that cannot train what it was given, here.

    Attributes:
        kind: "not installed" or "not possible".
    """

    def __init__(self, message: str = "", *, kind: Literal["not installed", "not possible"] = "not possible") -> None:
        super().__init__(message)
        self.kind = kind


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Return a hint that lists the known names nearest to `name`, or all of them if none is near.

    >>> nearest_names("digit", ["digits", "stdlib-text"])
    'did you mean digits?'
    >>> nearest_names("x", ["bf16", "fp16"])
    'known: bf16, fp16'
    """
    known = list(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(known)}"
