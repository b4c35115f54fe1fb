"""Operations that take 16-bit data and give 16-bit data, and compute and sum in FP32 inside.

A table of those that torch's kernels do otherwise: the function that is called, and its handler, which is called with
autocast off. The loss, whose result is FP32, is in `cross_entropy`. Left out: operations that torch computes in FP32
inside by itself.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duotone.torch.casting.float32_inside.channel_norms import (
    batch_norm_in_float32,
    group_norm_in_float32,
    instance_norm_in_float32,
    torch_batch_norm_in_float32,
    torch_instance_norm_in_float32,
)
from duotone.torch.casting.float32_inside.embeddings import (
    aten_embedding_to_float32,
    embedding_bag_in_float32,
    embedding_bag_to_float32,
    embedding_in_float32,
    embedding_to_float32,
    torch_embedding_in_float32,
)
from duotone.torch.casting.float32_inside.gathers import (
    gather_in_float32,
    index_select_in_float32,
    take_along_dim_in_float32,
    take_in_float32,
)
from duotone.torch.casting.float32_inside.indexing import getitem_in_float32, index_in_float32
from duotone.torch.casting.float32_inside.norms import layer_norm_in_float32, rms_norm_in_float32
from duotone.torch.casting.float32_inside.resampling import interpolate_in_float32
from duotone.torch.casting.float32_inside.windows import (
    max_pool_in_float32,
    pad_in_float32,
    slide_in_float32,
    unfold_in_float32,
)
from duotone.torch.casting.widened import widen_and_round, widen_to_data
from duotone.torch.internals.operators import ANTIALIASED

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
        (batch_norm_in_float32, (F.batch_norm,)),
        (instance_norm_in_float32, (F.instance_norm,)),
        (embedding_bag_in_float32, (F.embedding_bag,)),
        (getitem_in_float32, (Tensor.__getitem__,)),
        (index_select_in_float32, (torch.index_select, Tensor.index_select)),
        (gather_in_float32, (torch.gather, Tensor.gather)),
        (take_along_dim_in_float32, (torch.take_along_dim, Tensor.take_along_dim)),
        (take_in_float32, (torch.take, Tensor.take)),
    )
    for function in functions
} | {F.pad: pad_in_float32}

# operators of torch.ops.aten that take other arguments than the functions around them
OPERATORS_FLOAT32_INSIDE: Mapping[str, Handler] = {
    "embedding": as_handler(torch_embedding_in_float32),
    "embedding_bag": widen_to_data,
    "im2col": unfold_in_float32,
    "unfold": slide_in_float32,
    "col2im": widen_and_round,
    "pad": pad_in_float32,
    "index": as_handler(index_in_float32),
}

# where a residual stream in FP32 starts, on any device
TO_FLOAT32: Mapping[Function, Handler] = {
    F.embedding: as_handler(embedding_to_float32),
    torch.embedding: as_handler(aten_embedding_to_float32),
    F.embedding_bag: as_handler(embedding_bag_to_float32),
}

# on CPUs only: CUDA's kernels sum gradients, and take statistics, in FP32 themselves
FLOAT32_INSIDE_ON_CPU: Mapping[Function, Handler] = {
    F.embedding: as_handler(embedding_in_float32),
    torch.embedding: as_handler(torch_embedding_in_float32),
    torch.embedding_bag: widen_to_data,
    **{
        function: functools.partial(max_pool_in_float32, rank)
        for rank, functions in (
            (1, (F.max_pool1d, F.max_pool1d_with_indices, torch.max_pool1d, torch.max_pool1d_with_indices)),
            (2, (F.max_pool2d, F.max_pool2d_with_indices, torch.max_pool2d)),
            (3, (F.max_pool3d, F.max_pool3d_with_indices, torch.max_pool3d)),
        )
        for function in functions
    },
    F.unfold: unfold_in_float32,
    Tensor.unfold: slide_in_float32,
    F.fold: widen_and_round,
    F.interpolate: as_handler(interpolate_in_float32),
    torch.group_norm: widen_to_data,
    torch.native_layer_norm: widen_to_data,
    torch.native_group_norm: widen_to_data,
    torch.batch_norm: as_handler(torch_batch_norm_in_float32),
    torch.instance_norm: as_handler(torch_instance_norm_in_float32),
    **dict.fromkeys(ANTIALIASED, widen_and_round),
}
