"""Operations that take 16-bit data and give 16-bit data, and compute and sum in FP32 inside.

A table of those that torch's kernels do otherwise: the function that is called, and what is called instead, as
`replacement(func, args, kwargs)`, with autocast off. The norms are in `norms_in_float32`, embeddings in
`embeddings_in_float32`, `x[index]` in `indexing_in_float32` and its like in `gathers_in_float32`; the loss, whose
result is FP32, in `cross_entropy`. Left out: operations that torch computes in FP32 inside by itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duotone.torch.casting.float32_inside.embeddings import embedding_bag_in_float32, embedding_in_float32
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
Replacement = Callable[[Function, tuple[Any, ...], Mapping[str, Any]], Any]

# on any device
FLOAT32_INSIDE: Mapping[Function, Replacement] = {
    F.layer_norm: layer_norm_in_float32,
    torch.layer_norm: layer_norm_in_float32,
    F.rms_norm: rms_norm_in_float32,
    torch.rms_norm: rms_norm_in_float32,
    F.group_norm: group_norm_in_float32,
    F.batch_norm: batch_norm_in_float32,
    F.instance_norm: batch_norm_in_float32,
    F.embedding_bag: embedding_bag_in_float32,
    Tensor.__getitem__: getitem_in_float32,
    torch.index_select: index_select_in_float32,
    Tensor.index_select: index_select_in_float32,
    torch.gather: gather_in_float32,
    Tensor.gather: gather_in_float32,
    torch.take_along_dim: take_along_dim_in_float32,
    Tensor.take_along_dim: take_along_dim_in_float32,
    torch.take: take_in_float32,
    Tensor.take: take_in_float32,
}

# on CPUs only: CUDA's kernel adds the gradients of a row up in FP32 itself
FLOAT32_INSIDE_ON_CPU: Mapping[Function, Replacement] = {F.embedding: embedding_in_float32}
