"""The ranks that do something together, and that fail together: what goes wrong on one is raised on all.

Each step of work is followed by one exchange of what went wrong, so no rank waits for one that has given up, and all
know the same before the next step. Without torch.distributed there is one rank, which speaks to nobody.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from duotone.errors import CheckpointError

Result = TypeVar("Result")


class Ranks:
    """The ranks of a process group, or this process alone where torch.distributed is not initialised.

    Args:
        group: a process group; None for the default one.

    Attributes:
        group: as above.
        rank: of this process in the group, from 0.
        size: how many there are.

    Raises:
        CheckpointError: this process is not part of the group.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise CheckpointError("this rank is not part of the process group; call this on the ranks that are")

    def agree(self, action: Callable[[], Result]) -> Result:
        """Run an action on every rank; return its result once it has succeeded on all of them.

        Raises:
            CheckpointError: it failed on a rank; the same message on every rank. What is no `Exception`, such as
                KeyboardInterrupt, is raised as it is on the rank where it happened.
        """
        if self.size == 1:
            return action()
        failure: BaseException | None = None
        result: Any = None
        try:
            result = action()
        except BaseException as error:
            failure = error
        messages = self.gather(None if failure is None else _message(failure))
        if failure is not None and not isinstance(failure, Exception):
            raise failure
        failed = {rank: message for rank, message in enumerate(messages) if message is not None}
        if failed:
            raise CheckpointError(_joined(failed, self.size)) from failure
        return result

    def first(self, action: Callable[[], Any]) -> None:
        """Run an action on rank 0; return on every rank once it has succeeded.

        Raises:
            CheckpointError: as in `agree`.
        """
        self.agree(action if self.rank == 0 else lambda: None)

    def gather(self, value: Result) -> list[Result]:
        """Return what every rank gave, in their order, on every rank; it is pickled on the way.

        >>> Ranks().gather("alone")
        ['alone']
        """
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def check_same(self, value: Any, what: str) -> None:
        """Raise unless every rank gave an equal value.

        Raises:
            CheckpointError: one gave another than rank 0; on every rank.
        """
        values = self.gather(value)
        other = next((rank for rank, each in enumerate(values) if each != values[0]), None)
        if other is not None:
            raise CheckpointError(
                f"rank {other} has another {what} than rank 0: {_short(values[other])} and {_short(values[0])}; ranks "
                "that save or load together do the same, others name their own process_group"
            )


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _joined(failed: dict[int, str], size: int) -> str:
    """Return one message for all ranks; ranks are named unless all of them say the same."""
    if len(failed) == size and len(set(failed.values())) == 1:
        return failed[0]
    return "; ".join(f"{message} (on rank {rank})" for rank, message in failed.items())
