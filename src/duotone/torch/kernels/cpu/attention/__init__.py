"""Attention in BF16 on CPUs that multiply BF16 in pairs (AVX512-BF16), with a causal mask or none.

One kernel for each way, over all heads, on torch's threads. Beside its results a call needs, for each thread, two
(forward) or seven (backward) times the memory of one head of keys. Left out: CPUs with AMX, for which torch's own
attention has kernels.
"""

import math
from array import array
from functools import cache, lru_cache

import torch
from torch import Tensor

from duotone.torch.kernels.cpu.attention.sizes import BLOCK, backward_bytes, forward_bytes
from duotone.torch.kernels.cpu.machine_code import Entry, entry_of, host_features
from duotone.torch.kernels.cpu.threads import run_on_threads

# slices of a head for each thread, so that none waits long for the others
_SLICES = 4


@cache
def is_available() -> bool:
    """Return whether this CPU has the instructions, and none that are faster."""
    features = host_features()
    has_all = all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vl", "avx512bf16"))
    return has_all and not features.get("amx-bf16", False)


def forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return `softmax(scale * query key^T) value` and what it takes to compute the softmax again.

    Args:
        query: `(batch, heads, queries, width)`, BF16 on a CPU, its last dimension dense, `width` a multiple of 16.
        key: `(batch, key heads, keys, width)`; `heads` is a multiple of `key heads`. There is one key at least.
        value: as `key`.
        is_causal: whether a query sees only keys up to its own place.
        scale: above 0.

    Returns:
        The result, BF16, `(batch, heads, queries, width)`, laid out as `(batch, queries, heads, width)`; and the
        logs of sums, to the base of 2, FP32, `(batch, heads, queries)`.
    """
    batch, heads, queries, width = query.shape
    output = _empty_like(query)
    shift = torch.empty(batch, heads, queries, dtype=torch.float32)
    blocks = -(-queries // BLOCK)
    slices = max(1, min(blocks, -(-_SLICES * torch.get_num_threads() // max(1, batch * heads))))
    sizes = forward_bytes(key.shape[2], width)
    tensors = (query, key, value, output, shift)
    _run(_forward_entry(_columns(width)), tensors, batch * heads * slices, slices, sizes, is_causal, scale)
    return output, shift


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    shift: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, BF16.

    Args:
        grad: of the result; BF16, its last dimension dense.
        query: as in `forward`, as are those that follow.
        key: see there.
        value: see there.
        output: what `forward` returned.
        shift: what `forward` returned.
        is_causal: as in `forward`.
        scale: as in `forward`.
    """
    grads = _empty_like(query), _empty_like(key), _empty_like(value)
    sizes = backward_bytes(key.shape[2], query.shape[3])
    tensors = (query, key, value, output, shift, grad, *grads)
    parts = key.shape[0] * key.shape[1]
    _run(_backward_entry(_columns(query.shape[3])), tensors, parts, 1, sizes, is_causal, scale)
    return grads


def _run(
    entry: Entry, tensors: tuple[Tensor, ...], parts: int, slices: int, size: int, is_causal: bool, scale: float
) -> None:
    threads = max(1, min(torch.get_num_threads(), parts))
    size = -(-size // 64) * 64
    memory = torch.empty(threads * size + 64, dtype=torch.uint8)
    query, key = tensors[:2]
    batch, heads, queries, width = query.shape
    numbers = array("d", (scale / math.log(2.0), scale))
    words = [0, 0, parts, slices, -(-memory.data_ptr() // 64) * 64, size, batch, heads, key.shape[1], queries]
    job = array("q", [*words, key.shape[2], width, is_causal, 0, 0])
    job[-2:] = array("q", numbers.tobytes())
    for tensor in tensors:
        element, strides = tensor.element_size(), tensor.stride()
        job.extend((tensor.data_ptr(), *[element * stride for stride in (*strides, 1)[:3]]))
    run_on_threads(entry, job.buffer_info()[0], threads)


def _empty_like(tensor: Tensor) -> Tensor:
    """Return memory in the order in which the next projection takes it: heads side by side."""
    batch, heads, rows, width = tensor.shape
    return torch.empty(batch, rows, heads, width, dtype=tensor.dtype).transpose(1, 2)


@lru_cache(maxsize=64)
def _columns(width: int) -> int:
    return next(columns for columns in (64, 32, 16) if width % columns == 0)


@cache
def _forward_entry(columns: int) -> Entry:
    def make() -> Entry:
        from duotone.torch.kernels.cpu.attention import outputs

        return outputs.kernel(columns)

    return entry_of(f"attention-{columns}", make)


@cache
def _backward_entry(columns: int) -> Entry:
    def make() -> Entry:
        from duotone.torch.kernels.cpu.attention import gradients

        return gradients.kernel(columns)

    return entry_of(f"attention-backward-{columns}", make)
