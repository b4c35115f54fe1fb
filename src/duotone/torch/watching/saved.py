"""Bytes that autograd saves for the backward pass, each storage once.

Autograd hands every tensor that it saves to the innermost pair of `saved_tensors_hooks` alone. The count stands in a
pair of its own, which calls the pair around it, if there is one; and it looks at what pairs entered inside of it keep
instead of a tensor, so that a model which packs its activations, or recomputes them, is counted as what it keeps. Left
out: what is kept without autograd, in attributes or closures, and what is saved during a backward pass.
"""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from duotone.torch.internals.autograd import in_backward, pop_saved_hooks, push_saved_hooks, top_saved_hooks
from duotone.torch.internals.tensors import sparse_indices, sparse_values, storage_reference, wrapped_in

# how deep a packed object is searched for tensors
_DEPTH = 4


class SavedBytes:
    """A count of saved storages by the dtype in which they were first saved.

    Args:
        parameters: tensors that exist anyway, buffers too; what shares their storage is counted apart.

    Attributes:
        activation_bytes: bytes by dtype of everything else, the model's inputs included.
        parameter_bytes: bytes by dtype of the saved storages of `parameters`.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self.activation_bytes: Counter[str] = Counter()
        self.parameter_bytes: Counter[str] = Counter()
        self._parameters = {key for tensor in parameters for key in storage_keys(tensor)}
        self._seen: set[Hashable] = set()

    @property
    def total_activation_bytes(self) -> int:
        """The sum of `activation_bytes`."""
        return sum(self.activation_bytes.values())

    def add(self, tensor: Tensor) -> dict[str, int]:
        """Count what of a tensor has not been counted, and return the activation bytes by dtype that it added."""
        added: Counter[str] = Counter()
        for key, part in _storages_of(tensor):
            if key not in self._seen:
                self._seen.add(key)
                counts = (self.parameter_bytes,) if key in self._parameters else (self.activation_bytes, added)
                for count in counts:
                    count[dtype_name(part.dtype)] += part.untyped_storage().nbytes()
        return added


@contextmanager
def saved_for_backward(parameters: Iterable[Tensor] = ()) -> Iterator[SavedBytes]:
    """Count what autograd saves inside the block; the result is kept after it.

    A storage counts once, whole, however many views of it are saved: a saved slice keeps all of its tensor. Put the
    forward pass inside, and the backward pass where you like: what is saved during it does not count.

    Args:
        parameters: tensors that exist anyway, `model.parameters()` for instance; their storages are counted apart.

    >>> linear = nn.Linear(16, 4)
    >>> with saved_for_backward(linear.parameters()) as saved:
    ...     loss = linear(torch.ones(8, 16)).exp().sum()
    >>> saved.activation_bytes, saved.parameter_bytes
    (Counter({'float32': 640}), Counter())
    """
    counted = SavedBytes(parameters)
    with watch_saved(counted.add):
        yield counted


@contextmanager
def watch_saved(add: Callable[[Tensor], object]) -> Iterator[None]:
    """Call `add` with every tensor that autograd keeps for the backward pass, in this thread, inside the block."""
    outer = top_saved_hooks(False)
    thread = threading.get_ident()

    def adding(pack: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def packed(tensor: Tensor) -> Any:
            kept = pack(tensor)
            if not in_backward():
                for part in _tensors_in(kept, _DEPTH):
                    add(part)
            return kept

        return packed

    enter = saved_tensors_hooks.__enter__

    def enter_adding(hooks: saved_tensors_hooks) -> Any:
        if threading.get_ident() != thread:
            return enter(hooks)
        pack = hooks.pack_hook
        hooks.pack_hook = adding(pack)
        try:
            return enter(hooks)
        finally:
            hooks.pack_hook = pack

    pack, unpack = outer or (_itself, _itself)
    push_saved_hooks(adding(pack), unpack)
    # torch calls the innermost pair alone: without this, whatever enters a pair inside would hide what it keeps
    saved_tensors_hooks.__enter__ = enter_adding  # type: ignore[method-assign]
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
        pop_saved_hooks()


def storage_keys(tensor: Tensor) -> list[Hashable]:
    """Return what tells the storages of a tensor from others, even if one was freed and its memory is used again."""
    return [key for key, _ in _storages_of(tensor)]


def _storages_of(tensor: Tensor) -> Iterator[tuple[Hashable, Tensor]]:
    """Yield the storages that a tensor stands on, each with a plain tensor of it; a sparse tensor has several."""
    parts = wrapped_in(tensor)
    if parts is not None:
        for part in parts:
            yield from _storages_of(part)
    elif tensor.layout == torch.sparse_coo:
        yield from _storages_of(sparse_indices(tensor))
        yield from _storages_of(sparse_values(tensor))
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            yield from _storages_of(part)
    elif tensor.layout == torch.strided:
        try:
            yield storage_reference(tensor.untyped_storage()), tensor
        except (NotImplementedError, RuntimeError, ValueError):
            # a tensor without storage, as in torch.func's transforms or in a lazy module, holds no bytes of its own
            return


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without torch's.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, nn.Module | type):
        items: Iterable[Any] = ()
        if isinstance(value, dict):
            items = value.values()
        elif isinstance(value, tuple | list):
            items = value
        elif hasattr(value, "__dict__"):
            items = vars(value).values()
        for item in tuple(items):
            yield from _tensors_in(item, depth - 1)
