"""Processes that act together and fail together: what goes wrong on one rank is raised on all.

Each action is followed by one exchange of what went wrong, so no rank waits for one that has given up, and all know the
same before the next action. A framework provides the exchange; a process by itself needs none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from duotone import errors
from duotone.errors import DuotoneError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, of which this is one.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        exchange: returns the values that all ranks gave, in their order; None for a process by itself.
        error: raised for another rank's error if that is none of Duotone's.
        group: the framework's own name for the group.

    >>> Ranks().gather("alone"), Ranks().agree(lambda: 3)
    (['alone'], 3)
    """

    rank: int = 0
    size: int = 1
    exchange: Callable[[Any], list[Any]] | None = None
    error: type[DuotoneError] = DuotoneError
    group: Any = None

    def gather(self, value: Result) -> list[Result]:
        """Return the values that all ranks gave, in their order, on every rank; they are pickled on the way."""
        return [value] if self.exchange is None else self.exchange(value)

    def first(self, action: Callable[[], Result]) -> Result:
        """Run an action on rank 0 and return its result, pickled on the way, on every rank.

        Raises:
            DuotoneError: it failed; on every rank.
        """
        if self.exchange is None:
            return action()
        own, failure = _attempt(action) if self.rank == 0 else (None, None)
        result: Any
        result, text = self.gather((own, failure and _text_of(failure)))[0]
        if failure is not None:
            raise failure
        if text is not None:
            raise self._error(*text)
        return result

    def agree(self, action: Callable[[], Result]) -> Result:
        """Run an action, in which ranks do not communicate, on every rank; return its result once all have succeeded.

        Raises:
            DuotoneError: it failed on a rank; on every rank. An error that all of them have is raised as it is, and so
                is KeyboardInterrupt where it happens.
        """
        if self.exchange is None:
            return action()
        result, failure = _attempt(action)
        texts = self.gather(failure and _text_of(failure))
        if failure is not None and (len(set(texts)) == 1 or not isinstance(failure, Exception)):
            raise failure
        failed = {rank: text for rank, text in enumerate(texts) if text is not None}
        if failed:
            kind = next(iter(failed.values()))[0]
            message = "; ".join(f"{message} (on rank {rank})" for rank, (_, message) in failed.items())
            raise self._error(kind, message) from failure
        return result

    def _error(self, kind: str, message: str) -> DuotoneError:
        own: Any = getattr(errors, kind, None)
        is_own = isinstance(own, type) and issubclass(own, DuotoneError)
        return own(message) if is_own else self.error(message)


def _attempt(action: Callable[[], Result]) -> tuple[Any, BaseException | None]:
    try:
        return action(), None
    except BaseException as error:
        return None, error


def _text_of(error: BaseException) -> tuple[str, str]:
    """Return an error's kind and message; the message begins with the kind if that is none of Duotone's."""
    kind = type(error).__name__
    return kind, str(error) if isinstance(error, DuotoneError) else f"{kind}: {error}"
