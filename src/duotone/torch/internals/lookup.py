"""How a private name of torch is looked up: once, with a note whether it is there."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, NoReturn

import torch

from duotone.errors import BackendError

# whether this torch has a name, written "module:name"
HAS: dict[str, bool] = {}


def find(name: str, otherwise: Any = None) -> Any:
    """Return what torch has under a name, or what takes its place.

    >>> find("torch:no_such_thing", abs)(-1), HAS.pop("torch:no_such_thing")
    (1, False)
    """
    try:
        found = resolve_name(name)
    except (AttributeError, ImportError):
        found = None
    HAS[name] = found is not None
    return otherwise if found is None else found


def has_all(*parts: str) -> bool:
    """Return whether all names that were looked up are there that have one of these parts."""
    return all(there for name, there in HAS.items() if any(part in name for part in parts))


def find_or_refuse(name: str, purpose: str) -> Any:
    """Return what torch has under a name, or a function that raises a `BackendError`.

    Args:
        name: as in `find`.
        purpose: what needs it, as the error says: "explain needs it to see casts".
    """
    return find(name, refusal(name, purpose))


def refusal(name: str, purpose: str) -> Callable[..., NoReturn]:
    """Return a function that raises a `BackendError` in place of one that torch lacks.

    >>> refusal("torch:cast_rays", "explain needs it")()
    Traceback (most recent call last):
    ...
    duotone.errors.BackendError: torch ... has no torch.cast_rays, explain needs it; use another version
    """

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise BackendError(f"torch {torch.__version__} has no {name.replace(':', '.')}, {purpose}; use another version")

    return refuse
