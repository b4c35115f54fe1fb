"""What all ranks must agree on: the norm of the whole gradient, and whether any rank found an Inf or a NaN.

Where a gradient is cut over ranks (`fully_shard`, tensor parallelism), each sees a part; one all-gather of a few FP64
scalars for each dimension of the mesh makes the sums those of the whole, in the order of ranks, so that every rank has
the same bits, and every flag one of all. What is replicated counts once. Gradients that DDP has averaged are the same
on all ranks already; the ranks in their `Storage` agree on what is not, losses for instance.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch.internals.training import join_of
from duotone.torch.parameters.shards import is_shard, local, shards_among
from duotone.torch.parameters.storage import set_storage, storage_of


class SharedBy:
    """Names the ranks that hold copies of a parameter; copies of this record, and pickles, name none.

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
        config = join_of(self._wrapper and self._wrapper())
        if config is not None and config.enable and not config.throw_on_early_termination:
            raise OptimizerError(
                "ranks agree in every step, but in torch's Join those that run out of batches take no more steps, and "
                "the others would wait for them for ever; give every rank as many batches (DistributedSampler), or use "
                "Join(..., throw_on_early_termination=True)"
            )


class Agreement:
    """The ranks that some gradients are spread over, and how they agree.

    Args:
        params: the parameters that have a gradient, or might have.
        group: a process group whose ranks agree besides; None for the one in their `Storage`.

    Raises:
        OptimizerError: some of the ranks in the parameters' `Storage` may have stopped (`SharedBy.check_joint`).

    Attributes:
        is_needed: whether ranks have to exchange anything at all.
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
        # a mesh that lies in another exchanges first, so that in the end all ranks have the flags of all
        self._meshes.sort(key=lambda mesh: mesh.size())
        has_other_ranks = dist.get_world_size() > 1
        if group is None and not self._meshes and params and has_other_ranks:
            shared_by: SharedBy | None = storage_of(params[0]).ranks
            if shared_by is not None and shared_by.group is not None:
                shared_by.check_joint()
                group = shared_by.group
        self._group = group
        self.is_needed = bool(self._meshes) or group is not None
        self.is_known = self.is_needed or not has_other_ranks

    def shares(self, grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return this rank's parts of gradients, those together whose sums are exchanged together.

        Args:
            grads: plain tensors, and DTensors on the meshes of the parameters.

        Returns:
            Plain tensors: one list for each mesh, one of what was plain, and a last one of copies, which another rank
            has too and counts.
        """
        shares: list[list[Tensor]] = [[] for _ in range(len(self._meshes) + 2)]
        for grad in grads:
            if not is_shard(grad):
                shares[-2].append(grad)
            elif _counts(grad):
                shares[self._meshes.index(_mesh_of(grad))].append(local(grad))
            else:
                shares[-1].append(local(grad))
        return shares

    def combined(self, sums: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums over all ranks, and flags that are true where they are true on any rank.

        Args:
            sums: FP64, a row for each of the `shares` but the last one, a column for each thing that is summed.
            flags: bool, 1-d.

        Returns:
            The sums, 1-d, one for each column, and the flags; all ranks have the same bits.
        """
        *of_meshes, of_plain = sums
        for mesh, groups in self._rounds():
            for group in groups:
                own = of_plain.new_zeros(0) if mesh is None else of_meshes[mesh]
                total, of_plain, flags = _exchanged(group, own, of_plain, flags)
                if mesh is not None:
                    of_meshes[mesh] = total
        return torch.stack([*of_meshes, of_plain]).sum(0), flags

    def any(self, flags: Tensor) -> Tensor:
        """Return flags, bool, 1-d, that are true where they are true on any rank."""
        nothing = torch.zeros(0, dtype=torch.float64, device=flags.device)
        for _, groups in self._rounds():
            for group in groups:
                _, _, flags = _exchanged(group, nothing, nothing, flags)
        return flags

    def _rounds(self) -> list[tuple[int | None, list[Any]]]:
        """Return the process groups that exchange one after another, with the index of the mesh that they are of."""
        rounds: list[tuple[int | None, list[Any]]] = [
            (index, [mesh.get_group(dimension) for dimension in range(mesh.ndim)])
            for index, mesh in enumerate(self._meshes)
        ]
        return rounds if self._group is None else [*rounds, (None, [self._group])]


def set_ranks(param: Tensor, group: Any, wrapper: Any = None) -> None:
    """Set on a parameter which process group holds copies of it, and what keeps them the same."""
    set_storage(param, storage_of(param).changed(ranks=SharedBy(group, wrapper)))


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
    return all(index == 0 for index, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())


def _mesh_of(tensor: Any) -> Any:
    return tensor.device_mesh
