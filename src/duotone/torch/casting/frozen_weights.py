"""How weights that do not train are stored: rounded, in FP32, or with the tail that a trained weight would have.

Rounding is what the operands of products are for: they are read in 16 bits anyway, and a frozen base is most of a
model. Two kinds of weights are small, so by default they lose nothing:

- Tables keep a tail: weights of embeddings, and, in modules that are not torch's, vectors and what is broadcast over a
  batch, its first dimension being 1; each up to `LARGEST_TABLE` elements.
- Constants stay FP32, as buffers do: vectors in a module of that kind that has nothing else, such as the frequencies of
  a Fourier embedding, which multiply large numbers. Norms and layer scales have none.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from duotone.call_site import warn
from duotone.torch.kernels import SPLIT_DTYPES
from duotone.torch.parameters.storage import Storage

# 8 MiB of tail: positions have fewer elements, vocabularies more
LARGEST_TABLE = 2**22
FLOAT32: dict[str, Any] = {
    "param": torch.float32,
    "grad": torch.float32,
    "reduce": torch.float32,
    "state": torch.float32,
    "rounding": None,
}
_SHOWN = 2


def as_frozen(param: nn.Parameter, modules: Sequence[nn.Module], storage: Storage) -> Storage:
    """Return how a weight is stored that a policy would store in 16 bits if it were trained, and that is not.

    Args:
        param: any parameter.
        modules: those that have it: several, if it is tied.
        storage: how it would be stored if it were trained.
    """
    if param.requires_grad or storage.param not in SPLIT_DTYPES or storage.rounding is not None:
        return storage
    is_default = storage.frozen == "rounded"
    if storage.frozen == "float32" or (is_default and all(_is_constant(module) for module in modules)):
        return replace(storage, **{**FLOAT32, "reduce": storage.reduce, "state": storage.state})
    if is_default and all(_is_table(module, param) for module in modules):
        return replace(storage, frozen="tail")
    return storage


def warn_of_rounding(names: Sequence[str], elements: int) -> None:
    """Warn that a cast has rounded frozen weights.

    Args:
        names: of those that lost bits.
        elements: how many they have.
    """
    shown = ", ".join(names if len(names) <= _SHOWN + 1 else [*names[:_SHOWN], "...", names[-1]])
    warn(
        f"frozen weights were rounded to 16 bits and have no masters ({shown}): uncast, exports and a training that "
        "unfreezes them later start from the rounding; products read the same. To keep every bit write frozen=tail in "
        f"the policy, or in a rule, for {2 * elements:,} bytes more, or frozen=float32"
    )


def is_broadcast(module: nn.Module, param: nn.Parameter) -> bool:
    """Return whether a parameter is added to every item of a batch: a class token, a position embedding.

    It is of a module that is not torch's, and its first of several dimensions is 1: no product's operand is.

    >>> is_broadcast(nn.Linear(2, 1), nn.Parameter(torch.ones(1, 2)))
    False
    """
    return param.ndim > 1 and param.shape[0] == 1 and not _is_of_torch(module)


def _is_table(module: nn.Module, param: nn.Parameter) -> bool:
    is_embedding = isinstance(module, nn.Embedding | nn.EmbeddingBag)
    is_vector = param.ndim <= 1 and not _is_of_torch(module)
    return param.numel() <= LARGEST_TABLE and (is_embedding or is_vector or is_broadcast(module, param))


def _is_constant(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return (
        not any(True for _ in module.children())
        and not _is_of_torch(module)
        and not ("norm" in name or "scale" in name)
        and all(param.ndim <= 1 and not param.requires_grad for param in module.parameters(recurse=False))
    )


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")
