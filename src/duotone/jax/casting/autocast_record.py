"""What a function that `autocast` returned remembers of itself, for those who explain it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from duotone.policy import Policy

_NAME = "duotone_autocast"


@dataclass(frozen=True)
class Autocast:
    """A function under autocast.

    Attributes:
        function: what autocast returned.
        written: the function that it was given.
        policy: the policy.
        argnums: the arguments that are weights.
    """

    function: Callable[..., Any]
    written: Callable[..., Any]
    policy: Policy
    argnums: tuple[int, ...]

    def note(self) -> None:
        """Leave this on the function."""
        vars(self.function)[_NAME] = self


def autocast_of(function: Any) -> Autocast | None:
    """Return what is known of the function under autocast that another is, or was made of; None if there is none."""
    while function is not None:
        found = getattr(function, "__dict__", {}).get(_NAME)
        if found is not None:
            return found
        function = getattr(function, "__wrapped__", None)
    return None
