"""An optimizer's operands from one step to the next: gathered again only when a tensor is another one or has moved.

Looking closely at thousands of parameters in Python takes longer than updating them, if they are small. So each step
asks no more than it must: weights and states for their addresses, weights and gradients, all in one call, whether they
are what they were like. Where gradients lie may change at every step: `zero_grad` gives their memory back. Of DTensors
all of this is asked of this rank's parts.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from duotone.torch import kernels
from duotone.torch.internals.tensors import likeness_of
from duotone.torch.parameters.shards import gradient_part, is_shard, local, part_number
from duotone.torch.parameters.storage import storage_changes

Gathered = dict[torch.device, list[kernels.Operand]]
Groups = Sequence[dict[str, Any]]
States = dict[Tensor, dict[str, Any]]

_grad_of = attrgetter("grad")


class Gathering:
    """The operands that were gathered last, without their gradients, and what they looked like then.

    Attributes:
        shards: the DTensors among the parameters, as they were gathered last.
        split: the parameters with a tail, as they were gathered last.
    """

    def __init__(self) -> None:
        self.shards: list[Tensor] = []
        self.split: list[Tensor] = []
        self._look: _Look | None = None
        self._held: dict[torch.device, tuple[list[int], list[kernels.Operand], dict[str, Any]]] = {}

    def operands(
        self,
        groups: Groups,
        states: States,
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
        names = list(map(names_of, groups))
        grads = None if self._look is None else self._look.gradients(groups, states, names)
        if grads is None:
            gathered = gather()
            having = [param for group in groups for param in group["params"] if param.grad is not None]
            self.shards = [param for param in having if is_shard(param)]
            self.split = [param for param in having if "tail" in states[param]]
            if not all(kernels.is_contiguous(operand) for operands in gathered.values() for operand in operands):
                # these are copied at every step, so that their addresses say nothing
                self._look, self._held = None, {}
                return dict(gathered)
            # gathering has made states and tails that were not there before
            self._look, grads = _look_at(groups, states, names, has_shards=bool(self.shards))
            self._hold(gathered, sum(len(group["params"]) for group in groups))
        return {
            device: kernels.Batch(
                operands, grads if len(operands) == len(grads) else [grads[i] for i in positions], cache
            )
            for device, (positions, operands, cache) in self._held.items()
        }

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


@dataclass(frozen=True, eq=False)
class _Look:
    """What operands depend on, as it was when they were gathered; no gradient is held.

    Attributes:
        changes: `storage_changes()`.
        names: of the states' tensors that are part of operands, tails apart, group by group.
        every: the parameters, group by group; random bits depend on their indices.
        without: the indices of those without a gradient.
        owners: the parameters that have states, in the order of these.
        states: theirs.
        held: functions that return the tensors in a state that are part of an operand, and the states that each is for.
        addresses: of weights and of those tensors.
        memory: what lies there: as long as it is not given back, an address means the same tensor.
        are_alike: whether weights and gradients are what these were like; torch lets a gradient's `data` have another
            shape than its parameter.
        has_shards: whether there are DTensors.
    """

    changes: int
    names: list[tuple[str, ...]]
    every: list[list[Tensor]]
    without: list[int]
    owners: list[Tensor]
    states: list[dict[str, Any]]
    held: list[tuple[Callable[..., tuple[Tensor, ...]], list[dict[str, Any]]]]
    addresses: list[int]
    memory: list[torch.UntypedStorage]
    are_alike: Callable[..., bool]
    has_shards: bool

    def gradients(self, groups: Groups, states: States, names: list[tuple[str, ...]]) -> list[Tensor] | None:
        """Return this step's gradients if operands are as they were but for where these lie; otherwise None."""
        if (
            self.changes != storage_changes()
            or self.names != names
            or not all(map(_are_same, [group["params"] for group in groups], self.every))
            or not _are_same(states, self.owners)
            or not _are_same(states.values(), self.states)
        ):
            return None
        params, grads, without = _with_gradients(self.every)
        if without != self.without:
            return None
        try:
            weights, grads, tensors = _parts(params, grads, self.held, has_shards=self.has_shards)
            # not a generator in between: each of these calls is C's
            if list(map(Tensor.data_ptr, tensors)) == self.addresses and self.are_alike(*weights, *grads):
                return grads
        except (KeyError, TypeError, RuntimeError):
            # a tensor is not in its state any more, or is none, or has no memory
            pass
        return None


def _look_at(
    groups: Groups, states: States, names: list[tuple[str, ...]], *, has_shards: bool
) -> tuple[_Look, list[Tensor]]:
    """Return how operands look that were just gathered, and their gradients."""
    every = [list(group["params"]) for group in groups]
    held = []
    for group, own_names in zip(every, names, strict=True):
        own = [states[param] for param in group if param.grad is not None]
        for has_tail in (True, False):
            chosen = [state for state in own if ("tail" in state) == has_tail]
            keys = (*own_names, "tail") if has_tail else own_names
            # of a single name, the function would return no tuple
            held.append((itemgetter(*keys, *(keys if len(keys) == 1 else ())), chosen))
    params, grads, without = _with_gradients(every)
    weights, grads, tensors = _parts(params, grads, held, has_shards=has_shards)
    look = _Look(
        changes=storage_changes(),
        names=names,
        every=every,
        without=without,
        owners=list(states),
        states=list(states.values()),
        held=held,
        addresses=list(map(Tensor.data_ptr, tensors)),
        memory=[tensor.untyped_storage() for tensor in tensors],
        are_alike=likeness_of([*weights, *grads]),
        has_shards=has_shards,
    )
    return look, grads


def _with_gradients(every: Sequence[list[Tensor]]) -> tuple[list[Tensor], list[Any], list[int]]:
    """Return the parameters that have a gradient, their gradients, and the indices of the others."""
    params = every[0] if len(every) == 1 else list(chain.from_iterable(every))
    grads = list(map(_grad_of, params))
    without = [index for index, grad in enumerate(grads) if grad is None]
    if without:
        params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
        grads = [grad for grad in grads if grad is not None]
    return params, grads, without


def _parts(
    params: list[Tensor], grads: list[Tensor], held: Sequence[tuple[Any, list[dict[str, Any]]]], *, has_shards: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return weights and gradients, and all that is to stay where it is: weights and what is held of their states."""
    tensors = list(chain.from_iterable([chain.from_iterable(map(get, states)) for get, states in held]))
    if has_shards:
        grads, params, tensors = list(map(gradient_part, params)), list(map(local, params)), list(map(local, tensors))
    return params, grads, params + tensors


def _are_same(now: Collection[Any], before: Collection[Any]) -> bool:
    # `==` compares the values of tensors
    return len(now) == len(before) and all(map(is_, now, before))
