"""An optimizer's operands from one step to the next: gathered again only when a tensor is another one or has moved.

Looking closely at thousands of parameters in Python takes longer than updating them, if they are small. So each step only
asks every tensor where it is, of which dtype and how long, and compares the answers with those of the step before.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from duotone.torch import kernels
from duotone.torch.master import storage_marks_of

Gathered = dict[torch.device, list[kernels.Operand]]

_dtype_of = attrgetter("dtype")


class Gathering:
    """The operands that were gathered last, without their gradients, and what they looked like then."""

    def __init__(self) -> None:
        self._looks: list[Any] = []
        self._held: dict[torch.device, tuple[list[int], list[kernels.Operand], dict[str, Any]]] = {}

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
            names_of: returns the names of those tensors in a group's states that are part of an operand.
            gather: makes the operands anew.
        """
        grads, looks = _looks(groups, states, names_of)
        if not looks or looks != self._looks:
            gathered = gather()
            if not all(kernels.is_contiguous(operand) for operands in gathered.values() for operand in operands):
                # these are copied at every step, so that their addresses say nothing
                self._looks, self._held = [], {}
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
        order = sorted(operand.index for operands in gathered.values() for operand in operands)
        places = {index: place for place, index in enumerate(order)}
        self._held = {
            device: (
                [places[operand.index] for operand in operands],
                [operand._replace(grad=None) for operand in operands],  # type: ignore[arg-type]
                {},
            )
            for device, operands in gathered.items()
        }


def _looks(
    groups: Sequence[dict[str, Any]],
    states: dict[Tensor, dict[str, Any]],
    names_of: Callable[[dict[str, Any]], tuple[str, ...]],
) -> tuple[list[Tensor], list[Any]]:
    """Return the gradients there are, and what operands depend on, as values to compare.

    The latter is empty if a state is not there yet, or a gradient is sparse.
    """
    all_grads: list[Tensor] = []
    looks: list[Any] = []
    for group in groups:
        params = [param for param in group["params"] if param.grad is not None]
        grads = [param.grad for param in params]
        all_grads += grads
        tails, roundings = storage_marks_of(params)
        states_here = list(map(states.get, params))
        try:
            held = [tail for tail in tails if tail is not None]
            for name in names_of(group):
                held += [state[name] for state in states_here]
            looks += (
                [len(group["params"]), *map(id, params)],
                list(map(id, tails)),
                roundings,
                list(map(Tensor.data_ptr, params + grads + held)),
                list(map(_dtype_of, params + grads)),
                list(map(Tensor.numel, params)),
                list(map(Tensor.is_contiguous, params + grads)),
            )
        except (KeyError, TypeError, RuntimeError):
            return all_grads, []
    return all_grads, looks
