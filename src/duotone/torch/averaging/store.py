"""The averages themselves: which parameters and buffers of a model they are of, and where all of it lies.

Parameters in FP32, BF16 and FP16 have an average of their master in FP32; wider and complex ones in their own format.
Frozen parameters have none. Of a DTensor each rank has the average of its part, as a DTensor cut alike.
"""

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from duotone.errors import AverageError
from duotone.torch.kernels import AverageBatch, AverageOperand
from duotone.torch.parameters import shards
from duotone.torch.parameters.masters import read_master
from duotone.torch.parameters.storage import storage_changes, storage_of

_FOR_KERNELS = (torch.float32, torch.bfloat16, torch.float16)
_needs_grad = attrgetter("requires_grad")


class Store:
    """The averages of a model.

    Args:
        model: the model, without a wrapper around it.
        with_buffers: whether those of floating-point and complex buffers are among them.

    Attributes:
        model: as above.
        with_buffers: as above.
        params: the parameters that have an average, by name.
        averages: theirs, by the same names.
        buffers: the averages of buffers, by name.
    """

    def __init__(self, model: nn.Module, *, with_buffers: bool) -> None:
        self.model = model
        self.with_buffers = with_buffers
        self.params: dict[str, Tensor] = {}
        self.averages: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._looks: Any = None
        self._batches: dict[torch.device, AverageBatch] = {}
        self.take_up()

    def __getstate__(self) -> dict[str, Any]:
        # of copies and pickles nothing lies where it lay
        return {**self.__dict__, "_looks": None, "_batches": {}}

    def take_up(self) -> None:
        """Begin with what is not frozen and has no average yet."""
        shards.reshard(self.model)
        for name, param in _named(self.model).items():
            if param.requires_grad and name not in self.averages:
                self.params[name] = param
                self.averages[name] = copy_of(param)
        for name, buffer in self._own_buffers().items():
            if name not in self.buffers and (buffer.is_floating_point() or buffer.is_complex()):
                self.buffers[name] = copy_of(buffer)

    def batches(self) -> Mapping[torch.device, AverageBatch]:
        """Return what kernels need of all averages that they move, by device, as the model is now.

        Raises:
            AverageError: a parameter was replaced or has another shape.
        """
        shards.reshard(self.model)
        params, buffers = list(self.model.parameters()), self._own_buffers()
        parts = list(self.params.values())
        if shards.shards_among(parts):
            parts = list(map(shards.local, parts))
        looks = [
            storage_changes(),
            list(map(id, params)),
            list(map(_needs_grad, params)),
            list(map(Tensor.data_ptr, [*parts, *buffers.values()])),
        ]
        if looks != self._looks:
            self._check_own()
            self.take_up()
            operands: dict[torch.device, list[AverageOperand]] = {}
            for averages, name, value in self._pairs():
                if averages[name].device != value.device:
                    averages[name] = averages[name].to(value.device)
                if value.dtype in _FOR_KERNELS and value.numel():
                    tail = storage_of(value).tail
                    tail = None if tail is None else shards.local(tail)
                    operand = AverageOperand(shards.local(value.detach()), tail, shards.local(averages[name]))
                    operands.setdefault(value.device, []).append(operand)
            self._batches = {device: AverageBatch(tuple(each), {}) for device, each in operands.items()}
            self._looks = looks
        return self._batches

    def others(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield values and averages in formats that kernels do not read."""
        for averages, name, value in self._pairs():
            if value.dtype not in _FOR_KERNELS:
                yield value.detach(), averages[name]

    @property
    def size_bytes(self) -> int:
        """How many bytes all averages on this rank take."""
        kept = map(shards.local, (*self.averages.values(), *self.buffers.values()))
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def have_moved(self) -> bool:
        """Return whether a master is no longer what its average is; waits for the device."""
        return not all(
            shards.local(copy_of(param)).equal(shards.local(self.averages[name])) for name, param in self.params.items()
        )

    def model_state(self) -> dict[str, Any]:
        """Return the model's state dict with averages where there are any, masters elsewhere; all of it new."""
        shards.reshard(self.model)
        averages = {id(self.params[name]): average for name, average in self.averages.items()}
        for name, buffer in self._own_buffers().items():
            if name in self.buffers:
                averages[id(buffer)] = self.buffers[name].to(buffer.dtype)
        state = self.model.state_dict(keep_vars=True)
        return {name: _exported(value, averages.get(id(value))) for name, value in state.items()}

    def load(self, averages: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Take copies of other averages in place of these.

        Raises:
            AverageError: they are not those of such a model. Nothing is loaded then.
        """
        named, own_buffers = _named(self.model), dict(self.model.named_buffers())
        for name in self.params:
            if name not in averages:
                raise _not_of_this_model("state", name)
        for loaded, own in ((averages, named), (buffers, own_buffers)):
            for name, value in loaded.items():
                if name not in own:
                    raise _not_of_this_model("model", name)
                _check_loaded(name, value, own[name])
        self.params = {name: named[name] for name in averages}
        self.averages = {name: _loaded(value, named[name]) for name, value in averages.items()}
        self.buffers = {name: _loaded(value, own_buffers[name]) for name, value in buffers.items()}
        self._looks = None

    def _own_buffers(self) -> dict[str, Tensor]:
        return dict(self.model.named_buffers()) if self.with_buffers else {}

    def _pairs(self) -> Iterator[tuple[dict[str, Tensor], str, Tensor]]:
        """Yield where each average is, and what it is of."""
        for own, averages in ((self.params, self.averages), (self._own_buffers(), self.buffers)):
            for name in averages:
                yield averages, name, own[name]

    def _check_own(self) -> None:
        named = dict(self.model.named_parameters())
        for name, param in self.params.items():
            if named.get(name) is not param or param.shape != self.averages[name].shape:
                raise AverageError(
                    f'the parameter "{name}" was replaced or has another shape since the average was built; build it '
                    "anew, after fully_shard and whatever resizes the model"
                )


def copy_of(value: Tensor) -> Tensor:
    """Return a new tensor with a value's master; with the value itself where it is wider than FP32."""
    if value.dtype in _FOR_KERNELS:
        return read_master(value)
    return shards.like(shards.local(value.detach()).clone(), value)


def _named(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: param for name, param in named if param.is_floating_point() or param.is_complex()}


def _not_of_this_model(place: str, name: str) -> AverageError:
    return AverageError(f'the state is not one of an average of this model: the {place} has no "{name}"')


def _check_loaded(name: str, value: Tensor, own: Tensor) -> None:
    dtype = torch.float32 if own.dtype in _FOR_KERNELS else own.dtype
    if value.shape != own.shape or value.dtype != dtype:
        raise AverageError(
            f'the average of "{name}" is {value.dtype} {tuple(value.shape)} in the state, not {dtype} '
            f"{tuple(own.shape)}; load it for a model built alike"
        )
    if not shards.is_cut_like(value, own):
        raise AverageError(
            f'the average of "{name}" is {shards.cut_of(value)}, its parameter {shards.cut_of(own)}; load whole '
            "tensors (full_tensor()), or use load_checkpoint"
        )


def _loaded(value: Tensor, own: Tensor) -> Tensor:
    return shards.cut(value.detach().to(own.device, copy=True), own)


def _exported(value: Any, average: Tensor | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if average is not None:
        return average.clone()
    is_master = isinstance(value, nn.Parameter) and value.dtype in _FOR_KERNELS
    return read_master(value) if is_master else value.detach().clone()
