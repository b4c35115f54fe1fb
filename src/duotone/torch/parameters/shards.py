"""Parameters of which this rank holds a part: DTensors, as `fully_shard` and tensor parallelism make them.

Kernels go through raw memory, so they are given the local part; what belongs to a parameter (tail, moments) is a
DTensor again, cut as the parameter is, so that checkpoints can put the parts together. Nothing of torch.distributed is
loaded here: unless somebody else has, there are no DTensors.
"""

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from duotone.torch.internals.tensors import local_part

# nearly all are of these types, and asked about several times in a step
_PLAIN = (Tensor, nn.Parameter)


def is_shard(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    if type(tensor) in _PLAIN:
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shards_among(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the DTensors among tensors, at no cost for each where there can be none."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return [] if module is None else [tensor for tensor in tensors if isinstance(tensor, module.DTensor)]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, sharing its memory; any other tensor itself.

    >>> import torch
    >>> weight = torch.ones(2)
    >>> local(weight) is weight
    True
    """
    return tensor if type(tensor) in _PLAIN or not is_shard(tensor) else local_part(tensor)


def like(part: Tensor, whole: Tensor) -> Tensor:
    """Return a rank's part as a DTensor that is cut as `whole` is; itself if `whole` is no DTensor.

    Args:
        part: shaped like `local(whole)`, of any dtype.
        whole: a parameter.
    """
    if type(whole) in _PLAIN or not is_shard(whole):
        return part
    module: Any = sys.modules["torch.distributed.tensor"]
    return module.DTensor.from_local(
        part,
        whole.device_mesh,  # type: ignore[attr-defined]
        whole.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def is_cut_like(tensor: Tensor, whole: Tensor) -> bool:
    """Return whether `cut(tensor, whole)` is possible without asking other ranks, shapes apart."""
    if not is_shard(tensor):
        return True
    # a parameter that is no DTensor is cut into one part
    return is_shard(whole) and _cut(tensor) == _cut(whole)


def cut(tensor: Tensor, whole: Tensor) -> Tensor:
    """Return a tensor as a DTensor that is cut as `whole` is; itself if it is one, or if `whole` is none.

    Nothing is sent: each rank keeps its part of what it has.

    Args:
        tensor: cut like `whole`, or all of it, the same on every rank.
        whole: a parameter of the same shape.
    """
    if is_shard(tensor) or not is_shard(whole):
        return tensor
    module: Any = sys.modules["torch.distributed.tensor"]
    mesh, placements = _cut(whole)
    on_device = tensor.detach().to(whole.device)
    part = module.distribute_tensor(on_device, mesh, placements, src_data_rank=None)
    return like(local(part).clone(), whole)


def cut_of(tensor: Tensor) -> str:
    """Return in words how a tensor is cut."""
    if not is_shard(tensor):
        return "whole"
    mesh, placements = _cut(tensor)
    return f"cut as {', '.join(map(str, placements))} over a mesh of {tuple(mesh.shape)} ranks"


def gradient_part(param: Tensor) -> Tensor:
    """Return this rank's part of a parameter's gradient; a plain parameter's gradient itself.

    A gradient that is cut otherwise than its parameter, or has yet to be summed, as tensor parallelism leaves it, is
    first exchanged for one that is cut alike; ranks speak to each other then, once.
    """
    grad: Any = param.grad
    if is_shard(param) and is_shard(grad) and _cut(grad) != _cut(param):
        grad = param.grad = grad.redistribute(*_cut(param))
    return local(grad)


def part_number(param: Tensor) -> int:
    """Return which of a parameter's parts this rank holds, counted from 0; copies of a part have the same number."""
    if not is_shard(param):
        return 0
    mesh, placements = _cut(param)
    number = 0
    for dimension, (coordinate, placement) in enumerate(zip(mesh.get_coordinate(), placements, strict=True)):
        if not placement.is_replicate():
            number = number * mesh.size(dimension) + coordinate
    return number


def any_rank(flag: bool, param: Tensor) -> bool:
    """Return whether a flag is true on any rank that holds a part of a DTensor; of any other tensor, the flag itself.

    All of those ranks call it.
    """
    if not is_shard(param):
        return flag
    import torch
    import torch.distributed as dist

    mesh, _ = _cut(param)
    flags = torch.tensor([int(flag)], device=param.device)
    for dimension in range(mesh.ndim):
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
    return bool(flags)


def is_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` was called for a module, its parts apart."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def reshard(model: nn.Module) -> None:
    """Have every module of `fully_shard` hold the DTensors again, not what it has gathered for a forward pass."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()  # type: ignore[operator]


def _cut(tensor: Any) -> tuple[Any, Any]:
    return tensor.device_mesh, tensor.placements
