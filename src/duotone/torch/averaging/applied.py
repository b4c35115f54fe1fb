"""A model that holds averages for a while: written into its weights in place, and taken out again bit for bit.

Weights and tails are written where they lie, so that optimizers, shards and captured graphs find the same tensors
after as before. What was in them is kept aside meanwhile: 4 bytes per parameter, and the buffers. To autograd the
weights are afterwards those of before, so the block may stand between a forward and its backward pass; and inside of
it they are others than ever before or after, so that a backward pass of what was computed there is refused outside.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from duotone.errors import AverageError
from duotone.torch.internals.autograd import increment_version, set_version, version_of
from duotone.torch.kernels import decode
from duotone.torch.parameters import shards
from duotone.torch.parameters.edits import note_versions, read_tail, record
from duotone.torch.parameters.masters import write_master
from duotone.torch.parameters.storage import set_storage, set_tail, storage_of

# the parameters that hold averages just now, by `id`; whoever put them there keeps them alive
_held: set[int] = set()
# what versions of weights are ahead by inside of a block: more than a run writes, and another number in each block
_blocks = itertools.cycle(range(1 << 22, 1 << 31, 1 << 22))


class _Version(NamedTuple):
    """How often a tensor was written to before, and where it lay."""

    tensor: Tensor
    version: int
    place: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Version":
        return cls(tensor, version_of(tensor), shards.local(tensor).data_ptr())

    def go_ahead(self, by: int) -> None:
        """Have the tensor be one that autograd has never saved."""
        set_version(self.tensor, self.version + by)

    def come_back(self) -> None:
        """Have the tensor, whose values are back, be the one that autograd may have saved."""
        # elsewhere, those are not the values that it has saved
        if shards.local(self.tensor).data_ptr() == self.place:
            set_version(self.tensor, self.version)


class _Kept(NamedTuple):
    """What was in a parameter before: its own weight and tail, copies of both, and its version."""

    param: Tensor
    tail: Tensor | None
    weight_before: Tensor
    tail_before: Tensor | None
    version: _Version


def check_own_weights(params: Iterable[Tensor], action: str) -> None:
    """Raise if a parameter holds an average instead of its own master.

    Raises:
        AverageError: it does.
    """
    if _held and not _held.isdisjoint(map(id, params)):
        raise AverageError(
            f"cannot {action}: the model holds averages, not its own weights; do that after the block of "
            "average.applied(model)"
        )


@contextmanager
def holding(model: nn.Module, averages: Mapping[Tensor, Tensor], buffers: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Write averages into a model for the time of a block.

    Args:
        model: any.
        averages: of its parameters.
        buffers: of its buffers. All other buffers, too, are after the block what they were before.

    Raises:
        AverageError: an optimizer steps one of the parameters inside.
    """
    params = [*averages]
    shards.reshard(model)
    buffers_before = [(buffer, buffer.detach().clone(), _Version.of(buffer)) for buffer in model.buffers()]
    kept: list[_Kept] = []
    handle = register_optimizer_step_pre_hook(_refuser(frozenset(map(id, params))))
    _held.update(map(id, params))
    try:
        with torch.no_grad():
            for param, average in averages.items():
                kept.append(_keep(param))
                write_master(param, average)
            for buffer, average in buffers.items():
                buffer.copy_(average)
        ahead = next(_blocks)
        for version in (*(each.version for each in kept), *(version for _, _, version in buffers_before)):
            version.go_ahead(ahead)
        for each in kept:
            note_versions(each.param)
        yield
    finally:
        with torch.no_grad():
            shards.reshard(model)
            for each in kept:
                _give_back(each)
            for buffer, before, version in buffers_before:
                buffer.copy_(before)
                version.come_back()
        _held.difference_update(map(id, params))
        handle.remove()


def _keep(param: Tensor) -> _Kept:
    # as it belongs to the weight, which others may have changed
    tail_before = read_tail(param)
    tail_before = None if tail_before is None else tail_before.clone()
    weight_before = shards.local(param.detach()).clone()
    return _Kept(param, storage_of(param).tail, weight_before, tail_before, _Version.of(param))


def _give_back(kept: _Kept) -> None:
    param, tail, weight_before, tail_before, version = kept
    if shards.local(param).shape != weight_before.shape:
        param.data = shards.like(weight_before.clone(), param)
    resident = shards.local(param.detach())
    if resident.dtype != weight_before.dtype:
        # cast to another policy inside
        master = weight_before.float() if tail_before is None else decode(weight_before, tail_before)
        write_master(param, shards.like(master, param))
        return
    resident.copy_(weight_before)
    if resident is not param:
        increment_version(param)
    version.come_back()
    if tail is not None and tail_before is not None:
        shards.local(tail).copy_(tail_before)
        set_tail(param, tail)
        record(param)
    else:
        # another one, so that nobody takes this for a change of somebody else's
        set_storage(param, storage_of(param).changed())


def _refuser(ids: frozenset[int]) -> Any:
    def refuse(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(id(param) in ids for group in optimizer.param_groups for param in group["params"]):
            raise AverageError(
                f"{type(optimizer).__name__} was to step weights that hold averages, and the step would be lost; train "
                "after the block of average.applied(model)"
            )

    return refuse
