"""The base of the optimizers whose update is one kernel over all parameters; each names its update and settings."""

import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from duotone.errors import OptimizerError
from duotone.torch import kernels
from duotone.torch.internals.autograd import increment_version
from duotone.torch.kernels.slots import STATE_FORMATS, Slot
from duotone.torch.optim.base import MasterOptimizer, check_gradient, check_groups, listed, listed_layouts, run_closure
from duotone.torch.optim.edit_watch import EditWatch
from duotone.torch.optim.gathering import Gathering, numbered
from duotone.torch.optim.portable import (
    PortableFormat,
    portable_group,
    portable_state,
    settings_from_portable,
    state_from_portable,
)
from duotone.torch.optim.slots import TAIL, expected, is_cut, new_state, stored
from duotone.torch.parameters import shards
from duotone.torch.parameters.edits import checksums_of
from duotone.torch.parameters.masters import check_in_place, needs_tail
from duotone.torch.parameters.storage import set_tail, storage_of


class FusedOptimizer(MasterOptimizer):
    """An optimizer that hands all of its parameters to one kernel.

    A subclass names its update, whose slots say what is kept for a parameter, and its portable format.

    Args:
        params: parameters or parameter groups, as in torch.
        defaults: of the groups.
        backend: whose kernel runs.
    """

    _update: ClassVar[kernels.Update]
    _portable: ClassVar[PortableFormat]

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: kernels.Backend) -> None:
        kernels.check_backend(backend)
        # JSON, and so a checkpoint, knows no NumPy integers
        defaults["seed"] = operator.index(defaults["seed"])
        self.backend = backend
        self._gathering, self._edits = Gathering(), EditWatch()
        super().__init__(params, defaults)
        kernels.check_backend(backend, [param.device for param, _ in self._parameters()])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._gathering, self._edits = Gathering(), EditWatch()

    @kernels.uncompiled
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        grad_multiplier: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor | None:
        """Update every parameter that has a gradient. `scaler.step` calls it with its two keywords.

        Args:
            closure: computes the loss and its gradients first; together with the keywords it may not change gradients.
            grad_multiplier: FP32 scalar that gradients are multiplied by while they are read; 1 if absent.
            found_inf: bool scalar; if true, nothing is updated.

        Returns:
            What the closure returned.
        """
        loss = run_closure(self, closure, grad_multiplier, found_inf)
        self._edits.before_step()
        settings = [self._settings(group) for group in self.param_groups]
        by_device = self._gathering.operands(
            self.param_groups, self.state, self._update.names_in, self._operands_by_device
        )
        for device, operands in by_device.items():
            multiplier = _scalar(1.0 if grad_multiplier is None else grad_multiplier, torch.float32, device)
            is_skipped = _scalar(False if found_inf is None else found_inf, torch.bool, device)
            edits = self._edits.on(device)
            kernels.update(self._update, operands, settings, multiplier, is_skipped, self.backend, edits)
        if self._gathering.shards:
            # kernels know the parts alone, and autograd the parameters
            increment_version(self._gathering.shards)
        self._edits.after_step(self._gathering.split)
        return loss

    @classmethod
    def replaces(cls, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether a torch optimizer makes the same updates, so that this one can go on from its state."""
        # exact types: a subclass may change the update
        return type(optimizer) is cls._portable.counterpart and all(
            group.get(setting, only) == only
            for group in optimizer.param_groups
            for setting, only in cls._portable.fixed.items()
        )

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All that is kept for a parameter."""
        return (TAIL, *self._update.slots)

    @abstractmethod
    def _settings(self, group: dict[str, Any]) -> Any:
        """Return a group's settings as the update names them."""

    @torch.no_grad()
    def _operands_by_device(self) -> dict[torch.device, list[kernels.Operand]]:
        by_device: dict[torch.device, list[kernels.Operand]] = {}
        index, count = 0, sum(len(group["params"]) for group in self.param_groups)
        for number, group in enumerate(self.param_groups):
            names = self._update.moments_in(group)
            for param in group["params"]:
                grad = param.grad
                if grad is not None:
                    check_gradient(self, grad)
                    state = self._state_of(param, group)
                    step, tail = state["step"], state.get("tail")
                    device = step.device
                    if device != param.device:
                        raise _moved(device, param.device)
                    self._check_dtypes(index, state, group)
                    rounding = kernels.Rounding.NEAREST if tail is not None else _rounding(param)
                    moments = tuple([state[name] for name in names])
                    counters = None if self._update.counters is None else state[self._update.counters.name]
                    checksums = None if tail is None else checksums_of(param, tail)
                    weight, draws = param, index
                    if shards.is_shard(param):
                        weight, tail, grad, moments = _parts(param, tail, moments)
                        draws = numbered(index, count, param)
                    _check_shapes(
                        weight, index, {"gradient": grad, "tail": tail, **dict(zip(names, moments, strict=True))}
                    )
                    operand = kernels.Operand(
                        weight, tail, grad, moments, step, counters, rounding, draws, number, checksums
                    )
                    by_device.setdefault(device, []).append(operand)
                else:
                    check_in_place(param)
                index += 1
        return by_device

    def _needed_slots(self, group: Mapping[str, Any]) -> list[Slot]:
        return [slot for slot in self._update.slots if slot.is_needed(group)]

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self._take_tail(param)
        if not state.keys() >= set(self._update.names_in(group)):
            # what is there already stays: a momentum may be switched on later
            state.update({**new_state(self._needed_slots(group), param), **state})
        return state

    def _check_dtypes(self, index: int, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
        held = {slot.name: state[slot.name] for slot in self._needed_slots(group)}
        own = {slot.name: slot.format for slot in self._update.slots if slot.format is not None}
        counters = {slot.name: slot.shape for slot in self._update.slots if slot.is_counter}
        moments = {value.dtype for name, value in held.items() if name not in own}
        if (
            moments in (set(), *({each.dtype} for each in STATE_FORMATS.values()))
            and all(held[name].dtype == each.dtype for name, each in own.items() if name in held)
            and all(held[name].shape == shape for name, shape in counters.items() if name in held)
        ):
            return
        needed = [f"all in {name}" for name in STATE_FORMATS]
        fixed = [f"{name} in {_name(each.dtype)} {counters.get(name, '')}" for name, each in own.items()]
        raise OptimizerError(
            f"the state of parameter {index} was changed to {listed(held)}; needed are moments {' or '.join(needed)}, "
            f"{' and '.join(fixed)}: a torch optimizer's state is taken by load_portable_state_dict"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return groups and states as torch does, and under `"duotone"` what they are states of."""
        self._take_tails()
        packed = super().state_dict()
        return {**packed, "state": self._with_tails_to_save(packed["state"]), "duotone": self._marks()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Load a state dict of the same optimizer bit for bit; no tensor changes its dtype.

        Raises:
            OptimizerError: it is the state of another kind of optimizer, or of other weights, or a part is missing
                or of another shape or dtype. Nothing is loaded then.
        """
        self._check_kind(state_dict)
        groups, states = state_dict["param_groups"], state_dict["state"]
        for index, (param, group) in enumerate(self._with_groups(groups)):
            self._check_state(param, group, states.get(index, {}), index)
        self._replace(groups, states)
        for param, _ in self._parameters():
            if "tail" in self.state.get(param, {}):
                set_tail(param, self.state[param]["tail"])

    def portable_state_dict(self) -> dict[str, Any]:
        """Return a state dict that the torch optimizer of the same update loads, for FP32 weights.

        Moments are in FP32 and step counts as torch keeps them; masters are not part of it: give that optimizer weights
        from `master_weights`. Waits for the device.

        >>> import duotone.torch as dt
        >>> model = dt.cast(torch.nn.Linear(2, 1), "bf16")
        >>> optimizer = dt.AdamW(model.parameters(), lr=1e-2)
        >>> plain = torch.nn.Linear(2, 1)
        >>> plain.load_state_dict(dt.master_weights(model))
        <All keys matched successfully>
        >>> theirs = torch.optim.AdamW(plain.parameters())
        >>> theirs.load_state_dict(optimizer.portable_state_dict())
        >>> theirs.param_groups[0]["lr"]
        0.01
        """
        packed = super().state_dict()
        names = [slot.name for slot in self._update.moments]
        states = {index: portable_state(state, names, self._portable) for index, state in packed["state"].items()}
        return {
            "state": {index: state for index, state in states.items() if state},
            "param_groups": [portable_group(group, self._portable) for group in packed["param_groups"]],
        }

    def load_portable_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `portable_state_dict`, or the torch optimizer's `state_dict`, returned.

        Settings and moments are taken over, moments rounded to nearest in the dtype that this optimizer keeps them in.
        Masters and weights stay as they are; `load_master_weights` sets them.

        Raises:
            OptimizerError: it is the state of another kind of optimizer or model, or was made with a setting that has
                no counterpart here. Nothing is loaded then.
        """
        if "duotone" in state_dict:
            raise OptimizerError("the state is one of Duotone's own; load it with load_state_dict")
        check_groups(self, state_dict)
        name = type(self).__name__
        groups = [
            {**settings_from_portable(group, self._portable, name), "seed": own["seed"]}
            for group, own in zip(state_dict["param_groups"], self.param_groups, strict=True)
        ]
        states = {}
        for index, (param, group) in enumerate(self._with_groups(groups)):
            where = f"the state of parameter {index}"
            loaded = state_dict["state"].get(index)
            if loaded:
                needed = self._update.moments_in(group)
                every = [slot.name for slot in self._update.moments]
                steps, moments = state_from_portable(loaded, param, (needed, every), self._portable, where)
                states[index] = self._state_after(steps, moments, param, group) if steps else {}
        # a tail may be held by the old state alone; it then waits on its parameter for the new one
        self._take_tails()
        self._replace(groups, states)
        self._take_tails()

    def _state_after(
        self, steps: int, moments: Mapping[str, Tensor], param: Tensor, group: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the state of a parameter after some updates that left these moments, the tail apart."""
        slots, settings = self._needed_slots(group), self._settings(group)
        state = new_state(slots, param)
        for slot in slots:
            if not slot.is_counter:
                state[slot.name].copy_(shards.cut(moments[slot.name], param))
            elif slot.after is not None:
                state[slot.name].copy_(torch.tensor(slot.after(steps, settings), dtype=state[slot.name].dtype))
        return state

    def _with_groups(self, groups: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield every parameter with the group that is about to be loaded for it."""
        for own, group in zip(self.param_groups, groups, strict=True):
            for param in own["params"]:
                yield param, group

    def _replace(self, groups: list[dict[str, Any]], states: Mapping[int, Mapping[str, Tensor]]) -> None:
        # torch would cast moments and tails to the weight's dtype, so it is given the groups only
        shared = self.param_groups
        super().load_state_dict({"param_groups": groups, "state": {}})
        # the list stays the same one, for whoever holds it: the optimizer that prepare made this one from
        shared[:] = self.param_groups
        self.param_groups = shared
        for index, (param, _) in enumerate(self._parameters()):
            if states.get(index):
                copies = {key: value.detach().clone().to(param.device) for key, value in states[index].items()}
                self.state[param] = {
                    name: shards.cut(value, param) if is_cut(self, name, value.shape, param) else value
                    for name, value in copies.items()
                }

    def _check_state(self, param: Tensor, group: dict[str, Any], loaded: Mapping[str, Any], index: int) -> None:
        slots = self._needed_slots(group)
        tail = [TAIL] if needs_tail(param) else []
        needed = expected([*slots, *tail], param)
        allowed = [needed]
        # a parameter that never had a gradient holds its tail, and a frozen one may not even have that
        if tail:
            allowed.append(expected(tail, param))
        if not (tail and param.requires_grad):
            allowed.append({})
        counters = {slot.name for slot in slots if slot.is_counter}
        if not all(shards.is_cut_like(value, param) for name, value in loaded.items() if name not in counters):
            raise OptimizerError(
                f"the state of parameter {index} is {', '.join({shards.cut_of(value) for value in loaded.values()})}, "
                f"the parameter {shards.cut_of(param)}; load whole tensors, or a state of the same ranks"
            )
        if stored(loaded) not in allowed:
            raise OptimizerError(
                f"the state of parameter {index} holds {listed(loaded)}, {type(self).__name__} needs "
                f"{listed_layouts(needed)}; load a state dict that the same optimizer made under the same policy"
            )


def _parts(
    param: Tensor, tail: Tensor | None, moments: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor | None, Tensor, tuple[Tensor, ...]]:
    """Return this rank's parts of a DTensor and of what belongs to it."""
    return (
        shards.local(param),
        None if tail is None else shards.local(tail),
        shards.gradient_part(param),
        tuple(map(shards.local, moments)),
    )


def _scalar(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        # nearly always, and asking costs less than torch's own look
        return value if value.dtype is dtype and value.device == device else value.to(device, dtype)
    # filled on the device: a copy from the host would wait for it
    return torch.full((), value, dtype=dtype, device=device)


def _check_shapes(param: Tensor, index: int, tensors: Mapping[str, Tensor | None]) -> None:
    # a kernel goes through memory by the weight's length
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != param.shape:
            raise OptimizerError(
                f"parameter {index} has shape {tuple(param.shape)}, but its {name} has {tuple(tensor.shape)}; a "
                "parameter that changes its shape needs an optimizer of its own, or its state (and tail) "
                "removed or changed along with it"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounding(param: Tensor) -> kernels.Rounding:
    if param.dtype not in kernels.SPLIT_DTYPES:
        return kernels.Rounding.NEAREST
    return storage_of(param).rounding or kernels.Rounding.NEAREST


def _moved(before: torch.device, now: torch.device) -> OptimizerError:
    return OptimizerError(
        f"a parameter has moved from {before} to {now} since the optimizer first stepped; move the model first, then "
        "build the optimizer and load its state"
    )
