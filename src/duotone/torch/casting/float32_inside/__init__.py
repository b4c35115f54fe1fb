"""Operations that take 16-bit data and give 16-bit data, and compute and sum in FP32 inside.

A table of those that torch's kernels do otherwise: the function that is called, and its handler, which is called with
autocast off. The loss, whose result is FP32, is in `cross_entropy`. Left out: operations that torch computes in FP32
inside by itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duotone.torch.casting.float32_inside.embeddings import (
    aten_embedding_to_float32,
    embedding_bag_in_float32,
    embedding_bag_to_float32,
    embedding_in_float32,
    embedding_to_float32,
)
from duotone.torch.casting.float32_inside.gathers import (
    gather_in_float32,
    index_select_in_float32,
    take_along_dim_in_float32,
    take_in_float32,
)
from duotone.torch.casting.float32_inside.indexing import getitem_in_float32
from duotone.torch.casting.float32_inside.norms import (
    batch_norm_in_float32,
    group_norm_in_float32,
    layer_norm_in_float32,
    rms_norm_in_float32,
)

Function = Callable[..., Any]
# takes the function that was called, its positional and its named arguments, and returns the result
Handler = Callable[[Function, tuple[Any, ...], Mapping[str, Any]], Any]


def as_handler(replacement: Callable[..., Any]) -> Handler:
    """Return as a handler what takes the function that was called and, by its own signature, that function's arguments.

    >>> as_handler(lambda func, x, scale=1: func(x) * scale)(abs, (-2,), {"scale": 3})
    6
    """

    def handler(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return replacement(func, *args, **kwargs)

    return handler


# on any device
FLOAT32_INSIDE: Mapping[Function, Handler] = {
    function: as_handler(replacement)
    for replacement, functions in (
        (layer_norm_in_float32, (F.layer_norm, torch.layer_norm)),
        (rms_norm_in_float32, (F.rms_norm, torch.rms_norm)),
        (group_norm_in_float32, (F.group_norm,)),
        (batch_norm_in_float32, (F.batch_norm, F.instance_norm)),
        (embedding_bag_in_float32, (F.embedding_bag,)),
        (getitem_in_float32, (Tensor.__getitem__,)),
        (index_select_in_float32, (torch.index_select, Tensor.index_select)),
        (gather_in_float32, (torch.gather, Tensor.gather)),
        (take_along_dim_in_float32, (torch.take_along_dim, Tensor.take_along_dim)),
        (take_in_float32, (torch.take, Tensor.take)),
    )
    for function in functions
}

# where a residual stream in FP32 starts, on any device
TO_FLOAT32: Mapping[Function, Handler] = {
    F.embedding: as_handler(embedding_to_float32),
    torch.embedding: as_handler(aten_embedding_to_float32),
    F.embedding_bag: as_handler(embedding_bag_to_float32),
}

# on CPUs only: CUDA's kernel adds the gradients of a row up in FP32 itself
FLOAT32_INSIDE_ON_CPU: Mapping[Function, Handler] = {F.embedding: as_handler(embedding_in_float32)}
