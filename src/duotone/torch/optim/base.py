"""What every Duotone optimizer shares: tails, step counts, skipping on the device, and exact state dicts.

An optimizer reads `grad_multiplier` and `found_inf`, two device scalars, and knows nothing of loss scaling or clipping.
Without them it steps as any torch optimizer does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch.kernels import Rounding, Weights
from duotone.torch.master import ensure_tail, needs_tail, rounding_of, set_storage

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MasterOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that updates FP32 masters, whatever dtype the resident weights have."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and take the tails that wait on its parameters.

        Raises:
            OptimizerError: a parameter is neither FP32, BF16 nor FP16. The group is not added then.
        """
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            check_parameters(params)
        except OptimizerError:
            del self.param_groups[-1]
            raise
        for param in params:
            if param.requires_grad:
                self._take_tail(param)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        grad_multiplier: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor | None:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss, as in torch; not together with the others.
            grad_multiplier: FP32, 0-d, on the device; what gradients are multiplied by. Default 1.
            found_inf: bool, 0-d, on the device; if true nothing at all is changed. Default false.

        Returns:
            What the closure returned, or None.

        Raises:
            OptimizerError: a gradient is sparse, or a parameter has moved to another device.
        """
        loss = None
        if closure is not None:
            if grad_multiplier is not None or found_inf is not None:
                raise OptimizerError("a closure recomputes the gradients; call it before the step, not in it")
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            params, indices = [], []
            for param in group["params"]:
                if param.grad is not None:
                    params.append(param)
                    indices.append(index)
                index += 1
            if params:
                self._step_group(group, params, indices, grad_multiplier, found_inf)
        return loss

    @abstractmethod
    def _new_moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first update, tail and step count apart."""

    @abstractmethod
    def _update(
        self,
        group: dict[str, Any],
        weights: Weights,
        grads: list[Tensor],
        states: list[dict[str, Any]],
        grad_multiplier: Tensor,
        found_inf: Tensor,
    ) -> None:
        """Call the kernel that updates one group."""

    def _step_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        indices: list[int],
        grad_multiplier: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        device = params[0].device
        if grad_multiplier is None:
            grad_multiplier = torch.ones((), device=device)
        if found_inf is None:
            found_inf = torch.zeros((), dtype=torch.bool, device=device)
        grads, states = [], []
        for param in params:
            assert param.grad is not None
            if param.grad.is_sparse:
                raise OptimizerError(f"{type(self).__name__} takes no sparse gradients; use Embedding(sparse=False)")
            grads.append(param.grad)
            states.append(self._state_of(param, group))
        weights = Weights(
            values=[param.detach() for param in params],
            tails=[state.get("tail") for state in states],
            steps=[state["step"] for state in states],
            indices=indices,
            roundings=[rounding_of(param) or Rounding.NEAREST for param in params],
            seed=group["seed"],
        )
        self._update(group, weights, grads, states, grad_multiplier, found_inf)

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self._take_tail(param)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64, device=param.device)
            state.update(self._new_moments(param, group))
        if state["step"].device != param.device:
            raise OptimizerError(
                f"a parameter has moved from {state['step'].device} to {param.device} since the optimizer first "
                "stepped; move the model first, then build the optimizer and load its state"
            )
        return state

    def _take_tail(self, param: Tensor) -> dict[str, Any]:
        # at every step, since a parameter may have been unfrozen or cast anew since the last one
        state = self.state[param]
        if needs_tail(param):
            state["tail"] = ensure_tail(param, state.get("tail"))
        else:
            state.pop("tail", None)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Load a state dict of the same optimizer bit for bit; no tensor changes its dtype.

        Raises:
            OptimizerError: the state holds no tails although the weights need them, or belongs to another kind of
                optimizer. Nothing is loaded then.
        """
        saved, own = (
            [len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], self.param_groups)
        )
        if saved != own:
            raise OptimizerError(
                f"the state is of parameter groups of {saved} parameters, this {type(self).__name__} has {own}"
            )
        params = [(param, group) for group in self.param_groups for param in group["params"]]
        states = dict(state_dict["state"])
        for index, (param, group) in enumerate(params):
            self._check_state(param, group, states.get(index, {}), index)
        # torch would cast moments and tails to the weight's dtype, so it is given the groups only
        super().load_state_dict({**state_dict, "state": {}})
        for index, loaded in states.items():
            param, _ = params[index]
            self.state[param] = {key: value.detach().clone().to(param.device) for key, value in loaded.items()}
            if "tail" in loaded:
                set_storage(param, self.state[param]["tail"], None)

    def _check_state(self, param: Tensor, group: dict[str, Any], loaded: Mapping[str, Any], index: int) -> None:
        moments = self._new_moments(torch.empty_like(param, device="meta"), group)
        stepped = {"step": torch.Size(), **{name: moment.shape for name, moment in moments.items()}}
        allowed = [stepped]
        # a parameter that never had a gradient holds its tail, and a frozen one may not even have that
        if needs_tail(param):
            stepped["tail"] = param.shape
            allowed.append({"tail": param.shape})
        if not (needs_tail(param) and param.requires_grad):
            allowed.append({})
        if {name: getattr(value, "shape", None) for name, value in loaded.items()} not in allowed:
            raise OptimizerError(
                f"the state of parameter {index} holds {_listed(loaded)}, {type(self).__name__} needs "
                f"{_listed(stepped)}; load a state dict that the same optimizer made under the same policy, "
                "or hand the torch optimizer that made it to duotone.torch.prepare"
            )


def check_parameters(params: Iterable[Tensor]) -> None:
    """Raise unless a `MasterOptimizer` can update every one of the parameters.

    Raises:
        OptimizerError: one is neither FP32, BF16 nor FP16.
    """
    for param in params:
        if param.dtype not in _DTYPES:
            raise OptimizerError(
                f"a MasterOptimizer cannot update a parameter in {param.dtype}; allowed are float32, bfloat16 and "
                "float16: give the others to a torch optimizer"
            )


def _listed(state: Mapping[str, Any]) -> str:
    shapes = {name: tuple(getattr(value, "shape", value) or ()) for name, value in sorted(state.items())}
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing"
