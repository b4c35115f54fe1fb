"""A task whose batches have another number of samples: its own, joined along the first dimension and cut.

Each sample keeps its place in the order. Where a batch cannot be cut, because something in it has no dimension of
samples, or joined, because sequences differ in length, that is an error: padding would be another task.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from duotone.errors import CompareError, TaskError
from duotone.train.task import Batch, Task, map_batch, samples_in

_INSTEAD = "or compare without a search for the largest micro-batch"


def resized(task: Task, samples: int) -> Task:
    """Return the task with batches of exactly `samples` samples, and nothing else changed.

    An epoch is as many whole batches as the task's own holds samples for, and one at least: if it holds fewer, as many
    epochs as it takes are drawn from the same generator. What is left over at the end is not yielded. An epoch without
    a sample stays empty.

    Args:
        task: its batches are tensors of shape (samples, ...), in tuples, lists and mappings, nested in any way.
            Anything that is not a tensor is kept from the first of the batches that are joined.
        samples: of each batch.

    Raises:
        CompareError: `samples` is below 1; and while batches are drawn: a tensor's first dimension is not the samples,
            or batches differ in more than their number.

    >>> def batches(generator):
    ...     yield from torch.arange(6).split(2)
    >>> evaluate = lambda model: {"loss": 0.0}
    >>> task = Task("six", torch.nn.Linear(1, 1), lambda model, x: x.sum(), batches, evaluate)
    >>> [batch.tolist() for batch in resized(task, 3).batches(torch.Generator())]
    [[0, 1, 2], [3, 4, 5]]
    >>> [batch.tolist() for batch in resized(task, 8).batches(torch.Generator())]
    [[0, 1, 2, 3, 4, 5, 0, 1]]
    """
    if samples < 1:
        raise CompareError(f"a batch of {samples} samples cannot be made; give at least 1")

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        pending: list[Batch] = []
        pending_samples = 0
        yielded = False
        while not yielded:
            epoch_samples = 0
            for batch in task.batches(generator):
                count = _count(task.name, batch)
                if pending:
                    _check_alike(task.name, pending[0], batch)
                pending.append(batch)
                pending_samples += count
                epoch_samples += count
                while pending_samples >= samples:
                    pending_samples -= samples
                    yield _joined(pending, pending_samples)
                    yielded = True
            if not epoch_samples:
                return

    return replace(task, batches=batches)


def _joined(batches: list[Batch], left: int) -> Batch:
    """Take the batches of a list as one, all but the last `left` samples, which stay; no data are in memory twice."""
    *whole, last = batches
    batches[:] = [map_batch(lambda tensor: tensor[-left:], last)] if left else []
    parts = [*whole, map_batch(lambda tensor: tensor[: len(tensor) - left], last)]
    return map_batch(lambda first, *others: torch.cat([first, *others]) if others else first, *parts)


def _count(name: str, batch: Batch) -> int:
    """Return the number of samples, by which every tensor of the batch is as long."""
    try:
        samples = samples_in(batch)
    except TaskError as error:
        raise CompareError(
            f"a batch of task {name!r} holds no tensor with a dimension of samples, so its size cannot be changed; "
            f"let the batches hold tensors, {_INSTEAD}"
        ) from error
    for place, leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and (leaf.ndim == 0 or len(leaf) != samples):
            raise CompareError(
                f"{place} of task {name!r} has shape {tuple(leaf.shape)}, where a batch has {samples} samples; let "
                f"the first dimension of every tensor be the samples, {_INSTEAD}"
            )
    return samples


def _check_alike(name: str, one: Batch, other: Batch) -> None:
    forms = [{place: _form(leaf) for place, leaf in _leaves(batch)} for batch in (one, other)]
    for place in sorted(forms[0].keys() | forms[1].keys()):
        first, second = (form.get(place, "missing") for form in forms)
        if first != second:
            raise CompareError(
                f"{place} of task {name!r} is {first} in one batch and {second} in another, so they cannot be joined; "
                f"let all batches have one form, padded to one length for instance, {_INSTEAD}"
            )


def _form(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return "no tensor"
    shape = ", ".join(["samples", *map(str, leaf.shape[1:])])
    return f"{str(leaf.dtype).removeprefix('torch.')} of shape ({shape})"


def _leaves(batch: Batch, place: str = "batch") -> Iterator[tuple[str, Any]]:
    """Yield what a batch holds, and where in it; an empty list or mapping counts as held."""
    if isinstance(batch, Mapping) and batch:
        for key, item in batch.items():
            yield from _leaves(item, f"{place}[{key!r}]")
    elif isinstance(batch, list | tuple) and batch:
        for index, item in enumerate(batch):
            yield from _leaves(item, f"{place}[{index}]")
    else:
        yield place, batch
