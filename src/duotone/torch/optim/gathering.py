"""An optimizer's operands from one step to the next: gathered again only when a tensor is another one or has moved.

Looking closely at thousands of parameters in Python takes longer than updating them, if they are small. So each step
asks no more than it must: weights for address, dtype, length and layout, states for their addresses, gradients for
dtype, shape and layout. Where gradients lie may change at every step: `zero_grad` gives their memory back. Of DTensors
all of this is asked of this rank's parts.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from duotone.torch import kernels
from duotone.torch.parameters.shards import gradient_part, is_shard, local, part_number
from duotone.torch.parameters.storage import storage_changes

Gathered = dict[torch.device, list[kernels.Operand]]

_grad_of = attrgetter("grad")
_dtype_of = attrgetter("dtype")
_shape_of = attrgetter("shape")


class Gathering:
    """The operands that were gathered last, without their gradients, and what they looked like then.

    Attributes:
        shards: the DTensors among the parameters, as they were gathered last.
        split: the parameters with a tail, as they were gathered last.
    """

    def __init__(self) -> None:
        self.shards: list[Tensor] = []
        self.split: list[Tensor] = []
        self._looks: list[Any] = []
        self._held: dict[torch.device, tuple[list[int], list[kernels.Operand], dict[str, Any]]] = {}
        # as long as memory is not given back, an address means the same tensor
        self._memory: list[torch.UntypedStorage] = []
        # the states by their parameters' ids, and the ids of both: a tensor's hash is a call of a function in Python
        self._states: dict[int, dict[str, Any]] = {}
        self._states_look: Any = None

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
            names_of: returns the names of those tensors in a group's states that are part of an operand, tails apart.
            gather: makes the operands anew.
        """
        grads, _, looks = _looks(groups, self._by_id(states), names_of, bool(self.shards))
        if not looks or looks != self._looks:
            gathered = gather()
            every = [param for group in groups for param in group["params"]]
            self.shards = [param for param in every if is_shard(param) and param.grad is not None]
            self.split = [param for param in every if param.grad is not None and "tail" in states[param]]
            if not all(kernels.is_contiguous(operand) for operands in gathered.values() for operand in operands):
                # these are copied at every step, so that their addresses say nothing
                self._looks, self._held, self._memory = [], {}, []
                return dict(gathered)
            # gathering has made states and tails that were not there before
            grads, held, self._looks = _looks(groups, self._by_id(states), names_of, bool(self.shards))
            self._memory = [tensor.untyped_storage() for tensor in held]
            self._hold(gathered, len(every))
        return {
            device: kernels.Batch(
                operands, grads if len(operands) == len(grads) else [grads[i] for i in positions], cache
            )
            for device, (positions, operands, cache) in self._held.items()
        }

    def _by_id(self, states: dict[Tensor, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        look = list(map(id, states)), list(map(id, states.values()))
        if look != self._states_look:
            self._states, self._states_look = {id(param): state for param, state in states.items()}, look
        return self._states

    def _hold(self, gathered: Gathered, count: int) -> None:
        # gradients are not held, for their memory is to be free between two steps
        order = sorted(operand.number % count for operands in gathered.values() for operand in operands)
        positions = {index: position for position, index in enumerate(order)}
        self._held = {
            device: (
                [positions[operand.number % count] for operand in operands],
                [operand._replace(grad=None) for operand in operands],  # type: ignore[arg-type]
                {},
            )
            for device, operands in gathered.items()
        }


def numbered(index: int, count: int, param: Tensor) -> int:
    """Return the number by which a parameter's random bits are drawn: no two parts have the same, copies of one do.

    Args:
        index: the parameter's index in its optimizer.
        count: how many parameters that has.
        param: the parameter; a plain one's number is its index.
    """
    # numbers end at 2^30
    return index + count * (part_number(param) % ((1 << 30) // count))


def _looks(
    groups: Sequence[dict[str, Any]],
    states: dict[int, dict[str, Any]],
    names_of: Callable[[dict[str, Any]], tuple[str, ...]],
    has_shards: bool,
) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Return gradients, the states' tensors, and what operands depend on, as values to compare.

    States are given by the `id` of their parameter. Of DTensors, where it is said that there are any, all is that of
    this rank's parts. The last is empty if a state is
    not there yet, or a gradient is sparse.
    """
    all_grads: list[Tensor] = []
    all_held: list[Tensor] = []
    looks: list[Any] = [storage_changes()]
    for group in groups:
        every = group["params"]
        of_every = list(map(_grad_of, every))
        params = [param for param, grad in zip(every, of_every, strict=True) if grad is not None]
        grads = [grad for grad in of_every if grad is not None]
        own, parts = list(map(states.get, map(id, params))), params
        if has_shards:
            grads, parts = list(map(gradient_part, params)), list(map(local, params))
        all_grads += grads
        tensors = parts + grads
        try:
            held = [state["tail"] for state in own if "tail" in state]  # type: ignore[operator, index]
            for name in names_of(group):
                held += map(itemgetter(name), own)  # type: ignore[arg-type]
            if has_shards:
                held = list(map(local, held))
            looks += (
                # random bits depend on a parameter's index
                list(map(id, every)),
                list(map(id, params)) if len(params) < len(every) else [],
                list(map(Tensor.data_ptr, parts + held)),
                list(map(_dtype_of, tensors)),
                list(map(Tensor.numel, parts)),
                # torch lets a gradient's `data` have another shape than its parameter
                list(map(_shape_of, grads)),
                list(map(Tensor.is_contiguous, tensors)),
                list(map(Tensor.is_neg, grads)),
            )
        except (KeyError, TypeError, RuntimeError):
            return all_grads, [], []
        all_held += held
    return all_grads, all_held, looks
