"""Parameters of which this rank holds a part: DTensors, as `fully_shard` and tensor parallelism make them.

Kernels go through raw memory, so they are given the local part; what is kept for a parameter (tail, moments) is a
DTensor again, cut as the parameter is, so that checkpoints can put the parts together. Nothing of torch.distributed is
loaded here: unless somebody else has, there are no DTensors.
"""

import sys
from typing import Any

from torch import Tensor


def is_shard(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, sharing its memory; any other tensor itself.

    >>> import torch
    >>> weight = torch.ones(2)
    >>> local(weight) is weight
    True
    """
    return tensor._local_tensor if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def like(part: Tensor, whole: Tensor) -> Tensor:
    """Return a rank's part as a DTensor that is cut as `whole` is; itself if `whole` is no DTensor.

    Args:
        part: shaped like `local(whole)`, of any dtype.
        whole: a parameter.
    """
    if not is_shard(whole):
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
