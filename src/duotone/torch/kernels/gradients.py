"""All gradients of one optimizer, and what they are like: asked of thousands in one call, once it was seen before.

A step needs to know of every gradient its dtype, length, device and layout, and each question to each of thousands
takes longer in Python than reading them does in a kernel. From step to step they are alike, so the last few answers are
kept, without a gradient, and it is asked only whether these are like those.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from duotone.torch.internals.tensors import likeness_of

_device_of, _is_sparse = attrgetter("device"), attrgetter("is_sparse")


@dataclass(frozen=True, eq=False)
class GradKind:
    """What some gradients are like, in their order.

    Attributes:
        count: how many there are.
        devices: where they lie.
        are_sparse: whether one of them is sparse.
        are_contiguous: whether all of them are.
        holds: whether other gradients, one argument for each, are like these.
        cache: what was derived from all this; written to.
    """

    count: int
    devices: frozenset[torch.device]
    are_sparse: bool
    are_contiguous: bool
    holds: Callable[..., bool]
    cache: dict[str, Any] = field(default_factory=dict)


class GradBatch(Sequence[Tensor]):
    """The gradients of one step.

    Args:
        grads: the gradients.
        kind: what they are like.
    """

    def __init__(self, grads: list[Tensor], kind: GradKind) -> None:
        self._grads = grads
        self.kind = kind

    def __len__(self) -> int:
        return len(self._grads)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._grads)

    def __getitem__(self, index: Any) -> Any:
        return self._grads[index]


# those of a few optimizers, the last one first
_known: deque[GradKind] = deque(maxlen=16)


def batch_of(grads: Sequence[Tensor]) -> GradBatch:
    """Return gradients with what they are like; a batch itself."""
    if isinstance(grads, GradBatch):
        return grads
    grads, count = list(grads), len(grads)
    # another thread may change the order meanwhile
    for kind in tuple(_known):
        if kind.count == count and kind.holds(*grads):
            return GradBatch(grads, kind)
    are_sparse = any(map(_is_sparse, grads))
    kind = GradKind(
        count,
        frozenset(map(_device_of, grads)),
        are_sparse,
        not are_sparse and all(map(Tensor.is_contiguous, grads)),
        likeness_of(grads),
    )
    _known.appendleft(kind)
    return GradBatch(grads, kind)
