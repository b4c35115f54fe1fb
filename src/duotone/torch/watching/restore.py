"""Leaves a model and everything random as they were, whatever a forward pass did to them."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from duotone.torch.internals.autograd import version_of
from duotone.torch.internals.training import buffers_of


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore buffers, training flags and random states at the end of the block, after an error too.

    Buffers keep their identity. Of parameters, those are restored that a forward pass may renormalise: the weights of
    embeddings with `max_norm`. Random states are torch's, of every device that the model is on, Python's and NumPy's.
    Left out: attributes that are no buffers.
    """
    modules = list(model.modules())
    training = [(module, module.training) for module in modules]
    buffers = [(module, dict(buffers_of(module))) for module in modules]
    changeable = [buffer for _, held in buffers for buffer in held.values() if buffer is not None]
    for module in modules:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            changeable.append(module.weight)
    values = [
        (tensor, version_of(tensor), tensor.detach().clone())
        for tensor in dict.fromkeys(changeable)
        if _can_change(tensor)
    ]
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        for module, mode in training:
            module.training = mode
        for module, held in buffers:
            store = buffers_of(module)
            store.clear()
            store.update(held)
        with torch.no_grad():
            for tensor, version, value in values:
                # writing what is there already would spoil the graph of an earlier forward pass
                if version_of(tensor) != version or not torch.equal(tensor, value):
                    tensor.copy_(value)


def _can_change(tensor: Tensor) -> bool:
    """Return whether a tensor has values that a forward pass may write."""
    has_values = not isinstance(tensor, UninitializedBuffer | UninitializedParameter) and not tensor.is_meta
    return has_values and not tensor.is_inference()


def _cuda_devices(model: nn.Module) -> list[int]:
    tensors = [*model.parameters(), *model.buffers()]
    indices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    if indices:
        indices.add(torch.cuda.current_device())
    return sorted(index for index in indices if index is not None)
