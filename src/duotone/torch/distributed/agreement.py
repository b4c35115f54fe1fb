"""What all ranks must know alike: the norm of the whole gradient, and whether any rank found an Inf or a NaN.

Where a gradient is cut over ranks (`fully_shard`, tensor parallelism), each sees a part; one all-gather of a few FP64
scalars for each dimension of the mesh makes the sums those of the whole, in the order of ranks, so that every rank has
the same bits, and every flag one of all. What is replicated counts once. Gradients that DDP has averaged are the same
on all ranks already; the ranks that are noted on their parameters agree on what is not, losses for instance.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch.parameters.shards import is_shard, local, shards_among
from duotone.torch.parameters.storage import set_storage, storage_of


class SharedBy:
    """Names the ranks that hold copies of a parameter; copies of the note, and pickles, name none.

    Args:
        group: a process group of torch.distributed, or None.
        wrapper: the `DistributedDataParallel` that keeps the copies the same, or None.

    Attributes:
        group: as above.
    """

    def __init__(self, group: Any, wrapper: Any = None) -> None:
        self.group = group
        self._wrapper = None if wrapper is None else ref(wrapper)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedBy":
        return SharedBy(None)

    def __reduce__(self) -> Any:
        return SharedBy, (None,)

    def check_joint(self) -> None:
        """Raise inside of torch's `Join`, where a rank without batches takes no steps any more.

        Raises:
            OptimizerError: it is, unless all ranks stop together there.
        """
        config = getattr(self._wrapper and self._wrapper(), "_join_config", None)
        if config is not None and config.enable and not config.throw_on_early_termination:
            raise OptimizerError(
                "ranks agree in every step, but in torch's Join those that run out of batches take no more steps, and "
                "the others would wait for them for ever; give every rank as many batches (DistributedSampler), or use "
                "Join(..., throw_on_early_termination=True)"
            )


class Stats(NamedTuple):
    """What the gradients of one optimizer are like, on all ranks together.

    Attributes:
        sum_of_squares: of the true gradient: FP64, 0-d.
        found_inf: bool, 0-d: an Inf or a NaN is in one of them.
    """

    sum_of_squares: Tensor
    found_inf: Tensor


class Agreement:
    """The ranks that some gradients are spread over, and how they come to know the same.

    Args:
        params: the parameters that have a gradient, or might have.
        group: a process group in which all ranks agree besides; None for what the parameters tell.

    Raises:
        OptimizerError: the parameters tell of ranks, some of which may have stopped (`SharedBy.check_joint`).

    Attributes:
        is_needed: whether ranks have to speak to each other at all.
        is_known: whether it is known who the others are. It is not where torch.distributed runs several ranks, but
            neither the parameters nor the caller say which of them belong together.
    """

    def __init__(self, params: Sequence[Tensor], group: Any = None) -> None:
        self._meshes: list[Any] = []
        self._group = group
        self.is_needed, self.is_known = False, True
        # nearly always: most processes are no ranks
        if not (dist.is_available() and dist.is_initialized()):
            return
        for param in shards_among(params):
            if _mesh_of(param) not in self._meshes:
                self._meshes.append(_mesh_of(param))
        # a mesh that lies in another speaks first, so that in the end all know what any found
        self._meshes.sort(key=lambda mesh: mesh.size())
        several = dist.get_world_size() > 1
        if group is None and not self._meshes and params and several:
            note: SharedBy | None = storage_of(params[0]).ranks
            if note is not None and note.group is not None:
                note.check_joint()
                group = note.group
        self._group = group
        self.is_needed = bool(self._meshes) or group is not None
        self.is_known = self.is_needed or not several

    def stats(
        self,
        gradients: Sequence[Sequence[Tensor]],
        read: Callable[[int, list[Tensor]], tuple[Tensor, Tensor]],
        *flags: Tensor,
    ) -> tuple[list[Stats], list[Tensor]]:
        """Return what each optimizer's gradients are like on all ranks, and every flag as one of all ranks.

        Args:
            gradients: of each optimizer, plain tensors and DTensors.
            read: returns sum of squares and flag of some local gradients of an optimizer, given by its number.
            flags: bool, 0-d, true if it is so on this rank.
        """
        if not self.is_needed:
            return [Stats(*read(number, list(grads))) for number, grads in enumerate(gradients)], list(flags)
        count = len(gradients)
        sums: dict[Any, Tensor] = {}
        found: list[Tensor] = []
        for place in [*self._meshes, None]:
            counted, uncounted = [], []
            for number, grads in enumerate(gradients):
                here = [grad for grad in grads if (_mesh_of(grad) if is_shard(grad) else None) == place]
                counted.append(read(number, [local(grad) for grad in here if _counts(grad)]))
                uncounted.append(read(number, [local(grad) for grad in here if not _counts(grad)]))
            sums[place] = torch.stack([total for total, _ in counted])
            found += [torch.stack([flag for _, flag in each]) for each in (counted, uncounted)]
        told = torch.cat([torch.stack(found).any(0), *(flag.reshape(1) for flag in flags)])
        for place, groups in self._rounds():
            for group in groups:
                own = sums[place] if place is not None else sums[None].new_zeros(0)
                whole, sums[None], told = _exchanged(group, own, sums[None], told)
                if place is not None:
                    sums[place] = whole
        totals = torch.stack(list(sums.values())).sum(0)
        return [Stats(totals[i], told[i]) for i in range(count)], list(told[count:])

    def any(self, flags: Tensor) -> Tensor:
        """Return flags, bool, 1-d, that are true where they are true on any rank."""
        nothing = torch.zeros(0, dtype=torch.float64, device=flags.device)
        for _, groups in self._rounds():
            for group in groups:
                _, _, flags = _exchanged(group, nothing, nothing, flags)
        return flags

    def _rounds(self) -> list[tuple[Any, list[Any]]]:
        """Return the process groups that speak one after another, with the mesh that they are of."""
        rounds = [(mesh, [mesh.get_group(dimension) for dimension in range(mesh.ndim)]) for mesh in self._meshes]
        return rounds if self._group is None else [*rounds, (None, [self._group])]


def note_ranks(param: Tensor, group: Any, wrapper: Any = None) -> None:
    """Note on a parameter which process group holds copies of it, and what keeps them the same."""
    set_storage(param, replace(storage_of(param), ranks=SharedBy(group, wrapper)))


def _exchanged(group: Any, parts: Tensor, copies: Tensor, flags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of every rank's `parts`, the first rank's `copies`, and `flags` that are true on any rank."""
    own = torch.cat([parts, copies, flags.double()])
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, own, group=group)
    sizes = [parts.numel(), copies.numel(), flags.numel()]
    each_parts, each_copies, each_flags = zip(*(row.split(sizes) for row in rows), strict=True)
    # one order of addition on every rank and every backend
    return reduce(add, each_parts), each_copies[0], torch.stack(each_flags).bool().any(0)


def _counts(grad: Tensor) -> bool:
    """Return whether this rank's part goes into sums over the mesh, or is a copy of one that does."""
    if not is_shard(grad):
        return True
    coordinate: Any = _mesh_of(grad).get_coordinate()
    placements: Any = grad.placements  # type: ignore[attr-defined]
    return all(place == 0 for place, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())


def _mesh_of(tensor: Any) -> Any:
    return tensor.device_mesh
