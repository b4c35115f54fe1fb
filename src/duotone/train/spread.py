"""A model spread over ranks: whole on the only one, a copy on each (DDP), or cut into parts (FSDP2).

All three run a task's functions on the model, whatever these call of it: its forward, once or more, or other methods.
For that the two that wrap it wrap a module whose forward pass is the task's function. What FSDP gathers at a time is a
unit: the modules in a model's lists and sequences, such as the blocks of a transformer, and all the rest together.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import duotone.torch as dt
from duotone.errors import TaskError
from duotone.train.group import Mode

Result = TypeVar("Result")
Loss = Callable[[nn.Module, Any], Tensor]
Evaluate = Callable[[nn.Module], Mapping[str, float]]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Whole:
    """A model as it is."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def loss(self, function: Loss, batch: Any, *, is_last: bool) -> Tensor:
        """Return a task's loss for a batch.

        Args:
            function: the task's.
            batch: on the model's device.
            is_last: whether the step follows; gradients are averaged over ranks then.
        """
        return function(self._model, batch)

    def evaluate(self, function: Evaluate) -> Mapping[str, float]:
        """Return a task's figures; all ranks call this together."""
        return function(self._model)


class Replicated:
    """A copy of the model on every rank.

    Args:
        model: cast.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wrapped = dt.data_parallel(_Run(model))
        self._is_checked = False

    def loss(self, function: Loss, batch: Any, *, is_last: bool) -> Tensor:
        """As in `Whole`."""
        try:
            with nullcontext() if is_last else self._wrapped.no_sync():
                loss = self._wrapped(function, batch)
        except RuntimeError as error:
            # torch finds out one step late
            if "finished reduction in the prior iteration" not in str(error):
                raise
            raise _unused("some parameters") from error
        if is_last and not self._is_checked:
            self._check(loss)
        return loss

    def evaluate(self, function: Evaluate) -> Mapping[str, float]:
        """As in `Whole`."""
        return function(self._model)

    def _check(self, loss: Any) -> None:
        self._is_checked = True
        reached = _leaves_of(loss)
        named = self._model.named_parameters()
        unused = [name for name, param in named if param.requires_grad and param not in reached]
        if unused and reached:
            raise _unused(", ".join(unused[:3]) + (", ..." if len(unused) > 3 else ""))


class Sharded:
    """A part of the model on every rank.

    Args:
        model: cast; its parameters become DTensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._starts_step = True
        # where the model is, which need not be where torch would look first
        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for unit in units_of(model):
            dt.fully_shard(unit, mesh=mesh)
        self._wrapped: Any = dt.fully_shard(_Run(model), mesh=mesh)
        self._gather_once()

    def loss(self, function: Loss, batch: Any, *, is_last: bool) -> Tensor:
        """As in `Whole`."""
        if self._starts_step:
            # statistics of norms are rank 0's everywhere, as under DDP, so a checkpoint needs no other's
            for buffer in self._model.buffers():
                dist.broadcast(buffer, 0)
        self._starts_step = is_last
        self._wrapped.set_requires_gradient_sync(is_last)
        return self._wrapped(function, batch)

    def evaluate(self, function: Evaluate) -> Mapping[str, float]:
        """As in `Whole`."""
        with torch.no_grad():
            figures = self._wrapped(function)
        # no backward pass follows that would free what was gathered
        self._wrapped.reshard()
        return figures

    def _gather_once(self) -> None:
        """Have torch make the tensors that it gathers into: made within inference mode, they could not be trained."""
        from torch.distributed.fsdp import FSDPModule

        self._wrapped(lambda model: None)
        for module in self._wrapped.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()


Spread: TypeAlias = Whole | Replicated | Sharded


def spread(model: nn.Module, mode: Mode) -> Spread:
    """Return a cast model spread over the ranks in one of the three ways; build the optimizer after it.

    Raises:
        PolicyError: the policy keeps gradients in another dtype than weights, or reduces parts differently.
    """
    return {"whole": Whole, "ddp": Replicated, "fsdp": Sharded}[mode](model)


def units_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are gathered one at a time.

    Those are what lies in lists and sequences and has parameters, the outermost such modules that are neither list nor
    sequence themselves. One that shares a parameter with another part of the model is left to the rest.

    >>> units = units_of(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.ModuleList([nn.LSTM(2, 1), nn.Linear(2, 2)])))
    >>> [type(unit).__name__ for unit in units]
    ['Linear', 'LSTM', 'Linear']
    """
    units = list(dict.fromkeys(_units_in(model, is_inside=isinstance(model, _CONTAINERS))))
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(param, set()).add(module)
    return [unit for unit in units if all(owners[param] <= {*unit.modules()} for param in unit.parameters())]


def _units_in(module: nn.Module, *, is_inside: bool) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _units_in(child, is_inside=True)
        elif not is_inside:
            yield from _units_in(child, is_inside=False)
        elif next(child.parameters(), None) is not None:
            yield child


def _leaves_of(loss: Any) -> set[Tensor]:
    """Return the leaves of the graph that a loss was computed by."""
    nodes: set[Any] = {getattr(loss, "grad_fn", None)} - {None}
    queue = list(nodes)
    while queue:
        new = {node for node, _ in queue.pop().next_functions} - nodes - {None}
        nodes |= new
        queue += new
    return {node.variable for node in nodes if hasattr(node, "variable")}


def _unused(which: str) -> TaskError:
    return TaskError(
        f"a loss does not depend on {which}, and DDP waits for every parameter's gradient: freeze what is not trained "
        "(requires_grad = False), or spread the model by --parallel fsdp"
    )


class _Run(nn.Module):
    """Runs a function of a model as its own forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return function(self.model, *arguments)
