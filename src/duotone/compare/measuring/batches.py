"""The batches of a task, epoch after epoch, the same for the same seed whichever arm draws them.

Epoch `e` comes from a generator of its own, seeded with `seed * 2^32 + e`, as in `duotone.train.Trainer`.
"""

from collections.abc import Iterator

import torch

from duotone.errors import TaskError
from duotone.train import Task
from duotone.train.task import Batch


def endless_batches(task: Task, seed: int) -> Iterator[Batch]:
    """Yield batches for ever.

    Raises:
        TaskError: an epoch yields none.

    >>> from duotone.train import built_in_task
    >>> batches = endless_batches(built_in_task("stdlib-text:tiny"), 0)
    >>> torch.equal(next(batches), next(batches))
    False
    """
    epoch = 0
    while True:
        is_empty = True
        for batch in task.batches(torch.Generator().manual_seed(seed * 2**32 + epoch)):
            is_empty = False
            yield batch
        if is_empty:
            raise TaskError(f"the data set of task {task.name!r} is empty: an epoch yields no batch")
        epoch += 1
