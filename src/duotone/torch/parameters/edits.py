"""Edits: what others write into 16-bit weights, noticed by checksums of what Duotone has written last.

Neither versions nor addresses show all of them: `p.data.mul_`, a fused optimizer of torch and a kernel of one's own
leave both as they are. So the checksums of a weight (`kernels.checksums`) hang on the tail that belongs to it. Where
they differ from those of the weight as it is now, that is its own master, and its tail counts as 0, for a cell of 512
elements at a time: whatever in there was not changed is rounded once, by at most half a unit of its 16 bits. Reading
changes nothing, so weights that are exchanged for a while and put back have their masters again.

A tail that takes another's place has no checksums; whoever writes weight and tail in place calls `record`. An edit that
changes no bit, since it is smaller than half a unit, cannot be seen here (`foreign_writes`).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from duotone.torch.internals.autograd import version_of
from duotone.torch.kernels import Edits
from duotone.torch.kernels.checksums import changed_cells, elements_of, is_other, sums_of_each, unknown
from duotone.torch.kernels.layout import dense
from duotone.torch.parameters import shards
from duotone.torch.parameters.storage import CHECKSUMS, set_tail, storage_of

# torch copies them with the tail
_RECORDS, _LOOK = "_duotone_records", "_duotone_look"
# how often `record` was called, for all weights
recorded = [0]
# how many forward passes of cast models there were, compiled ones apart, and how many steps of optimizers
passes, steps = [0], [0]


def checksums_of(param: Tensor, tail: Tensor) -> Tensor:
    """Return the checksums of a parameter, of a DTensor those of this rank's part; a step compares and writes them.

    If there are none for the parameter as it lies in memory now, they are made, unknown.
    """
    return _checksums(shards.local(param), tail)


def record(*params: Tensor, unless: Tensor | None = None) -> None:
    """Take note that the weights and tails of parameters, as they are now, belong together.

    Args:
        params: parameters, with tails or without.
        unless: bool, 0-d, on their device; if true, nothing happens.
    """
    found = []
    for param in params:
        tail = storage_of(param).tail
        if tail is not None and not tail.is_meta:
            found.append((param, tail, shards.local(param.detach())))
    every = sums_of_each(_flat(weight) for _, _, weight in found)
    for (param, tail, weight), sums in zip(found, every, strict=True):
        cells = _checksums(weight, tail)[:-1]
        cells.copy_(sums if unless is None else torch.where(unless, cells, sums))
        setattr(tail, _RECORDS, records_of(tail) + 1)
        setattr(tail, _LOOK, _look_at(param))
        recorded[0] += 1


def note_versions(param: Tensor) -> None:
    """Take note that whatever was written into a parameter so far was written by Duotone, or is no matter."""
    tail = storage_of(param).tail
    if tail is not None:
        setattr(tail, _LOOK, _look_at(param))


def _look_at(param: Tensor) -> tuple[int, ...]:
    return id(param), versions_of(param), passes[0], steps[0]


def writes_since(param: Tensor) -> int:
    """Return how often others have written into a parameter since `note_versions`, 0 if an optimizer stepped since.

    Four writes for each forward pass are not counted: weights that are exchanged, or changed for a trial, and put back.
    """
    look: Any = getattr(storage_of(param).tail, _LOOK, None)
    if look is None or look[0] != id(param) or look[3] != steps[0]:
        return 0
    return max(versions_of(param) - look[1] - 4 * (passes[0] - look[2]), 0)


def versions_of(param: Tensor) -> int:
    """Return how often torch has counted a write into a parameter; of a DTensor also into this rank's part."""
    part = shards.local(param)
    # torch counts an operation on a DTensor for that alone
    return version_of(param) if part is param else version_of(param) + version_of(part)


def records_of(tail: Tensor | None) -> int:
    """Return how often `record` was called for the weight of a tail."""
    return getattr(tail, _RECORDS, 0)


def read_tail(param: Tensor) -> Tensor | None:
    """Return this rank's part of a parameter's tail as it belongs to the weight as it is now; None if there is none."""
    return next(read_tails((param,)))


def read_tails(
    params: Iterable[Tensor], edits: Callable[[torch.device], Edits | None] | None = None
) -> Iterator[Tensor | None]:
    """Yield for each of some parameters what `read_tail` returns.

    Args:
        params: the parameters.
        edits: returns where to note, on a device, that weights were changed.
    """
    found = []
    for param in params:
        tail, weight = storage_of(param).tail, shards.local(param.detach())
        found.append((weight, tail, None if tail is None else _held(weight, tail)))
    every = sums_of_each(_flat(weight) for weight, _, held in found if held is not None)
    for weight, tail, held in found:
        part = None if tail is None else shards.local(tail)
        if part is None or held is None:
            yield part
            continue
        sums = next(every)
        # nearly always, and a CPU is not waited for; a tensor that stands for another has no values
        if type(sums) is Tensor and sums.is_cpu and torch.equal(sums, held[:-1]):
            yield part
            continue
        changed = is_other(sums, held)
        noted = None if edits is None else edits(weight.device)
        if noted is not None:
            mark = torch.where(changed.any(), noted.mark, 0).to(torch.int32)
            for marks in (noted.seen, held[-1]):
                marks.bitwise_or_(mark)
        # cells are counted in the order of memory
        is_stale = elements_of(changed, weight.numel()).as_strided(weight.shape, dense(weight).stride())
        # unlike `masked_fill`, this leaves elements in their order in memory
        yield torch.where(is_stale, part.new_zeros(()), part)


def tail_to_save(param: Tensor) -> Tensor | None:
    """Return a parameter's tail, or, if the weight was changed, a new one that belongs to it. Waits for the device."""
    tail = storage_of(param).tail
    if tail is None or not is_edited(param):
        return tail
    part = read_tail(param)
    return None if part is None else shards.like(part, param)


def is_edited(param: Tensor) -> bool:
    """Return whether a weight is known to have been changed since Duotone wrote it. Waits for the device."""
    tail, weight = storage_of(param).tail, shards.local(param.detach())
    held = None if tail is None else _held(weight, tail)
    return held is not None and bool(changed_cells(_flat(weight), held).any())


def carry(before: Tensor, param: Tensor) -> None:
    """Have a parameter that was moved, to another device or into another order in memory, keep its master.

    Args:
        before: as it was, in the memory of then, with its record.
        param: as it is.
    """
    tail = storage_of(before).tail
    weight = shards.local(param.detach())
    if tail is None or tail.is_meta or weight.is_meta or _look(shards.local(before)) == _look(weight):
        return
    part = read_tail(before)
    assert part is not None
    set_tail(param, shards.like(torch.empty_like(weight, dtype=part.dtype).copy_(part), param))
    record(param)


def follow(param: Tensor) -> None:
    """Have a parameter's tail in memory belong to the weight as it is now."""
    tail = storage_of(param).tail
    part = read_tail(param)
    if tail is not None and part is not None and not tail.is_meta:
        shards.local(tail).copy_(part)
        record(param)


def _checksums(weight: Tensor, tail: Tensor) -> Tensor:
    held = _held(weight, tail)
    if held is None:
        # what is made in inference mode no step could write to
        with torch.inference_mode(False):
            held = unknown(weight)
        setattr(tail, CHECKSUMS, (held, *_look(weight)))
    return held


def _held(weight: Tensor, tail: Tensor) -> Tensor | None:
    """Return the checksums on a tail, if they are those of a weight that lies in memory as this one does."""
    held: Any = getattr(tail, CHECKSUMS, None)
    return held[0] if held is not None and held[1:] == _look(weight) else None


def _look(weight: Tensor) -> tuple[Any, ...]:
    return str(weight.device), weight.dtype, tuple(weight.shape), weight.stride()


def _flat(weight: Tensor) -> Tensor:
    return dense(weight).as_strided((weight.numel(),), (1,))
