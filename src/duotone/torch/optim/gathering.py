"""An optimizer's operands from one step to the next: gathered again only when a tensor is another one or has moved.

Looking closely at thousands of parameters in Python takes longer than updating them, if they are small. So each step
asks no more than it must: weights and gradients for address, dtype, length and layout, states for the same tensors as
before, and the first moment for its address, since who moves a state moves all of it.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from duotone.torch import kernels
from duotone.torch.master import storage_changes

Gathered = dict[torch.device, list[kernels.Operand]]

_dtype_of = attrgetter("dtype")


class _Looks(NamedTuple):
    """What operands depend on.

    Attributes:
        facts: numbers and dtypes that are compared by value.
        states: tensors of the states that are compared by identity.
    """

    facts: list[Any]
    states: list[Tensor]


class Gathering:
    """The operands that were gathered last, without their gradients, and what they looked like then."""

    def __init__(self) -> None:
        self._looks: _Looks | None = None
        self._held: dict[torch.device, tuple[list[int], list[kernels.Operand], dict[str, Any]]] = {}
        # memory that a table of addresses names must not be given back, even if a state is given other data
        self._memory: list[torch.UntypedStorage] = []

    def operands(
        self,
        groups: Sequence[dict[str, Any]],
        states: dict[Tensor, dict[str, Any]],
        names_of: Callable[[dict[str, Any]], tuple[str, ...]],
        gather: Callable[[], Gathered],
    ) -> dict[torch.device, Sequence[kernels.Operand]]:
        """Return the operands of every device.

        Args:
            groups: the parameter groups.
            states: of each parameter.
            names_of: returns the names of those tensors in a group's states that are part of an operand, a moment
                first if there is one.
            gather: makes the operands anew.
        """
        grads, looks = _looks(groups, states, names_of)
        if not _same(looks, self._looks):
            gathered = gather()
            if not all(kernels.is_contiguous(operand) for operands in gathered.values() for operand in operands):
                # these are copied at every step, so that their addresses say nothing
                self._looks, self._held, self._memory = None, {}, []
                return dict(gathered)
            # gathering has made states and tails that were not there before
            grads, self._looks = _looks(groups, states, names_of)
            self._hold(gathered)
        return {
            device: kernels.Batch(operands, grads if len(operands) == len(grads) else [grads[i] for i in places], noted)
            for device, (places, operands, noted) in self._held.items()
        }

    def _hold(self, gathered: Gathered) -> None:
        # gradients are not held, for their memory is to be free between two steps
        order = sorted(operand.number for operands in gathered.values() for operand in operands)
        places = {index: place for place, index in enumerate(order)}
        self._held = {
            device: (
                [places[operand.number] for operand in operands],
                [operand._replace(grad=None) for operand in operands],  # type: ignore[arg-type]
                {},
            )
            for device, operands in gathered.items()
        }
        assert self._looks is not None
        self._memory = [tensor.untyped_storage() for tensor in self._looks.states]


def _same(looks: _Looks | None, before: _Looks | None) -> bool:
    if looks is None or before is None or looks.facts != before.facts or len(looks.states) != len(before.states):
        return False
    return all(map(is_, looks.states, before.states))


def _looks(
    groups: Sequence[dict[str, Any]],
    states: dict[Tensor, dict[str, Any]],
    names_of: Callable[[dict[str, Any]], tuple[str, ...]],
) -> tuple[list[Tensor], _Looks | None]:
    """Return the gradients, and what operands depend on: None if a state is not there yet, or a gradient is sparse."""
    all_grads: list[Tensor] = []
    facts: list[Any] = [storage_changes()]
    held: list[Tensor] = []
    for group in groups:
        params = [param for param in group["params"] if param.grad is not None]
        grads = [param.grad for param in params]
        all_grads += grads
        own = list(map(states.get, params))
        try:
            first, *others = [[state[name] for state in own] for name in names_of(group)]  # type: ignore[index]
            held += first
            for other in others:
                held += other
            tensors = params + grads
            facts += (
                [len(group["params"]), *map(id, params)],
                list(map(Tensor.data_ptr, tensors)),
                list(map(Tensor.data_ptr, first)),
                list(map(_dtype_of, tensors)),
                list(map(Tensor.numel, params)),
                list(map(Tensor.is_contiguous, tensors)),
            )
        except (KeyError, TypeError, RuntimeError):
            return all_grads, None
    return all_grads, _Looks(facts, held)
