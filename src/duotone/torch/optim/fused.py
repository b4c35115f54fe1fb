"""The base of the optimizers whose update is one kernel over all parameters; each says its settings and moments."""

import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from duotone.errors import OptimizerError
from duotone.torch import kernels
from duotone.torch.internals.autograd import increment_version
from duotone.torch.optim.base import MasterOptimizer, check_gradient, check_groups, listed, run_closure
from duotone.torch.optim.gathering import Gathering, numbered
from duotone.torch.optim.portable import (
    PortableForm,
    portable_group,
    portable_state,
    settings_from_portable,
    state_from_portable,
)
from duotone.torch.parameters import shards
from duotone.torch.parameters.masters import check_in_place, needs_tail
from duotone.torch.parameters.storage import set_storage, set_tail, storage_of

# what is kept for a parameter besides tensors of its shape
_COUNTERS = ("step", "beta_products")


class FusedOptimizer(MasterOptimizer):
    """An optimizer that hands all of its parameters to one kernel.

    Args:
        params: parameters or parameter groups, as in torch.
        defaults: of the groups.
        backend: whose kernel runs.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: kernels.Backend) -> None:
        kernels.check_backend(backend)
        # JSON, and so a checkpoint, knows no NumPy integers
        defaults["seed"] = operator.index(defaults["seed"])
        self.backend = backend
        self._gathering = Gathering()
        super().__init__(params, defaults)
        kernels.check_backend(backend, [param.device for param, _ in self._parameters()])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._gathering = Gathering()

    @kernels.uncompiled
    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        grad_multiplier: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor | None:
        """Update every parameter that has a gradient; see `MasterOptimizer.step`."""
        loss = run_closure(closure, grad_multiplier, found_inf)
        settings = [self._settings(group) for group in self.param_groups]
        by_device = self._gathering.operands(self.param_groups, self.state, self._held_names, self._operands_by_device)
        for device, operands in by_device.items():
            multiplier = _scalar(1.0 if grad_multiplier is None else grad_multiplier, torch.float32, device)
            is_skipped = _scalar(False if found_inf is None else found_inf, torch.bool, device)
            self._update(operands, settings, multiplier, is_skipped)
        if self._gathering.shards:
            # kernels know the parts alone, and autograd the parameters
            increment_version(self._gathering.shards)
        return loss

    @abstractmethod
    def _moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of a group's moments in the order of the kernel."""

    @abstractmethod
    def _settings(self, group: dict[str, Any]) -> NamedTuple:
        """Return a group's hyper-parameters as the kernel takes them."""

    @abstractmethod
    def _update(
        self, operands: Sequence[kernels.Operand], settings: list[Any], grad_multiplier: Tensor, found_inf: Tensor
    ) -> None:
        """Call the kernel."""

    def _held_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the tensors in a state that are part of an operand, moments first, the tail apart."""
        return (*self._moment_names(group), "step")

    def _operands_by_device(self) -> dict[torch.device, list[kernels.Operand]]:
        by_device: dict[torch.device, list[kernels.Operand]] = {}
        index, count = 0, sum(len(group["params"]) for group in self.param_groups)
        for number, group in enumerate(self.param_groups):
            names = self._moment_names(group)
            for param in group["params"]:
                grad = param.grad
                if grad is not None:
                    check_gradient(self, grad)
                    state = self._state_of(param, names)
                    step, tail = state["step"], state.get("tail")
                    device = step.device
                    if device != param.device:
                        raise _moved(device, param.device)
                    rounding = kernels.Rounding.NEAREST if tail is not None else _rounding(param)
                    moments = tuple([state[name] for name in names])
                    products = state.get("beta_products")
                    weight, draws = param, index
                    if shards.is_shard(param):
                        weight, tail, grad, moments = _parts(param, tail, moments)
                        draws = numbered(index, count, param)
                    _check_shapes(
                        weight, index, {"gradient": grad, "tail": tail, **dict(zip(names, moments, strict=True))}
                    )
                    _check_dtypes(index, moments, step, products)
                    operand = kernels.Operand(weight, tail, grad, moments, step, products, rounding, draws, number)
                    by_device.setdefault(device, []).append(operand)
                else:
                    check_in_place(param)
                index += 1
        return by_device

    def _new_state(self, param: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first update, the tail apart."""
        moments = {name: torch.zeros_like(param, dtype=storage_of(param).state, requires_grad=False) for name in names}
        return {"step": torch.zeros((), dtype=torch.int64, device=param.device), **moments}

    def _state_of(self, param: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
        state = self._take_tail(param)
        if "step" not in state or not state.keys() >= set(names):
            # what is there already stays: a momentum may be switched on later
            state.update({**self._new_state(param, names), **state})
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return groups and states as torch does, and under `"duotone"` what they are states of."""
        self._take_tails()
        return {**super().state_dict(), "duotone": self._marks()}

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
        states = {index: portable_state(state, self._portable) for index, state in packed["state"].items()}
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
                steps, moments = state_from_portable(loaded, param, self._portable, where)
                states[index] = self._state_after(steps, moments, param, group) if steps else {}
        # a tail may be held by the old state alone; it then waits on its parameter for the new one
        self._take_tails()
        self._replace(groups, states)
        self._take_tails()

    @property
    @abstractmethod
    def _portable(self) -> PortableForm:
        """How the torch optimizer of the same update keeps its states."""

    def _state_after(
        self, steps: int, moments: Mapping[str, Tensor], param: Tensor, group: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the state of a parameter after some updates that left these moments, the tail apart."""
        state = self._new_state(param, self._moment_names(group))
        state["step"].fill_(steps)
        for name in self._moment_names(group):
            state[name].copy_(shards.cut(moments[name], param))
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
                for name in copies.keys() - _COUNTERS:
                    copies[name] = shards.cut(copies[name], param)
                self.state[param] = copies

    def _check_state(self, param: Tensor, group: dict[str, Any], loaded: Mapping[str, Any], index: int) -> None:
        needed = self._needed_state(param, group)
        allowed = [_forms(needed)]
        # a parameter that never had a gradient holds its tail, and a frozen one may not even have that
        if needs_tail(param):
            allowed.append(_forms({"tail": needed["tail"]}))
        if not (needs_tail(param) and param.requires_grad):
            allowed.append({})
        if not all(shards.is_cut_like(value, param) for name, value in loaded.items() if name not in _COUNTERS):
            raise OptimizerError(
                f"the state of parameter {index} is {', '.join({shards.cut_of(value) for value in loaded.values()})}, "
                f"the parameter {shards.cut_of(param)}; load whole tensors, or a state of the same ranks"
            )
        if _forms(loaded) not in allowed:
            raise OptimizerError(
                f"the state of parameter {index} holds {listed(loaded)}, {type(self).__name__} needs {listed(needed)}; "
                "load a state dict that the same optimizer made under the same policy"
            )

    def _needed_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return a parameter's whole state, without memory."""
        meta = torch.empty(param.shape, dtype=param.dtype, device="meta")
        set_storage(meta, storage_of(param))
        needed = self._new_state(meta, self._moment_names(group))
        if needs_tail(param):
            needed["tail"] = torch.empty_like(meta, dtype=torch.int16)
        return needed


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


def _forms(state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (getattr(value, "dtype", None), getattr(value, "shape", None)) for name, value in state.items()}


def _scalar(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device, dtype)
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


def _check_dtypes(index: int, moments: tuple[Tensor, ...], step: Tensor, products: Tensor | None) -> None:
    moments_fit = {moment.dtype for moment in moments} in (set(), {torch.float32}, {torch.bfloat16})
    counters_fit = step.dtype == torch.int64 and step.dim() == 0
    if products is not None:
        counters_fit = counters_fit and products.dtype == torch.float64 and products.shape == (2,)
    if not (moments_fit and counters_fit):
        held = {"step": step, "beta_products": products, **{f"moment {i}": moment for i, moment in enumerate(moments)}}
        raise OptimizerError(
            f"the state of parameter {index} was changed to {listed(held)}; needed are moments all in float32 or all "
            "in bfloat16, step in int64 () and beta_products in float64 (2,): a torch optimizer's state is taken by "
            "load_portable_state_dict"
        )


def _rounding(param: Tensor) -> kernels.Rounding:
    if param.dtype not in kernels.SPLIT_DTYPES:
        return kernels.Rounding.NEAREST
    return storage_of(param).rounding or kernels.Rounding.NEAREST


def _moved(before: torch.device, now: torch.device) -> OptimizerError:
    return OptimizerError(
        f"a parameter has moved from {before} to {now} since the optimizer first stepped; move the model first, then "
        "build the optimizer and load its state"
    )
