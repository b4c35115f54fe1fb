"""The ranks of a torch process group that save or load together; without torch.distributed, one process."""

from typing import Any

import torch.distributed as dist

from duotone.errors import CheckpointError
from duotone.ranks import Ranks


def ranks_of(group: Any = None) -> Ranks:
    """Return the ranks of a process group, None for the default one; or of this process if there is none.

    Raises:
        CheckpointError: this process is not part of the group.

    >>> ranks_of().size
    1
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(error=CheckpointError)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise CheckpointError("this rank is not part of the process group; call this on the ranks that are")

    def exchange(value: Any) -> list[Any]:
        values: list[Any] = [None] * size
        dist.all_gather_object(values, value, group=group)
        return values

    return Ranks(rank, size, exchange if size > 1 else None, CheckpointError, group)


def check_same(ranks: Ranks, value: Any, what: str) -> None:
    """Raise unless all ranks gave equal values.

    Raises:
        CheckpointError: one gave another than rank 0; on every rank.
    """
    values = ranks.gather(value)
    other = next((rank for rank, each in enumerate(values) if each != values[0]), None)
    if other is not None:
        raise CheckpointError(
            f"rank {other} has another {what} than rank 0: {_short(values[other])} and {_short(values[0])}; ranks "
            "that save or load together do the same, others name their own process_group"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
