"""All three mechanisms put into an existing model and torch optimizer with one call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from duotone.errors import OptimizerError
from duotone.policy import Policy
from duotone.torch.cast import cast
from duotone.torch.loss_scaler import LossScaler
from duotone.torch.optim import SGD, AdamW, MasterOptimizer, check_parameters


class Prepared(NamedTuple):
    """A model, an optimizer and a scaler that fit one policy."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: LossScaler


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, policy: Policy | str) -> Prepared:
    """Cast a model, replace its torch optimizer by one with FP32 masters, and make the scaler.

    Hyper-parameters, parameter groups and state are taken over. `torch.optim.AdamW` and `SGD` have counterparts;
    any other optimizer is kept if the policy's weights are FP32, and refused if they are 16-bit.

    Args:
        model: a module; cast in place.
        optimizer: its optimizer; a Duotone optimizer is kept. Use the returned one from here on, and build
            schedulers on that.
        policy: a policy or its text.

    Returns:
        `(model, optimizer, scaler)`.

    Raises:
        PolicyError: as `cast` does.
        OptimizerError: there is no counterpart with masters, or a setting that it does not have. The model is
            unchanged then.

    >>> model = nn.Linear(2, 1)
    >>> model, optimizer, scaler = prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-4), "bf16")
    >>> type(optimizer).__module__, optimizer.param_groups[0]["lr"]
    ('duotone.torch.optim.adamw', 0.0003)
    """
    policy = Policy.parse(policy)
    convert = _conversion(optimizer, policy)
    model = cast(model, policy)
    return Prepared(model, convert(optimizer), LossScaler(policy))


def _conversion(
    optimizer: torch.optim.Optimizer, policy: Policy
) -> Callable[[torch.optim.Optimizer], torch.optim.Optimizer]:
    if isinstance(optimizer, MasterOptimizer):
        return lambda kept: kept
    params = [param for group in optimizer.param_groups for param in group["params"]]
    # exact types: a subclass may change the update
    if type(optimizer) is torch.optim.AdamW:
        _refuse(optimizer, "amsgrad")
        check_parameters(params)
        return _to_adamw
    if type(optimizer) is torch.optim.SGD:
        check_parameters(params)
        return _to_sgd
    if policy.param == "float32" and not policy.rules:
        return lambda kept: kept
    raise OptimizerError(
        f"{type(optimizer).__name__} has no counterpart that keeps FP32 masters of 16-bit weights; use AdamW or "
        'SGD, or a policy with FP32 weights such as "bf16-mixed"'
    )


def _refuse(optimizer: torch.optim.Optimizer, setting: str) -> None:
    if any(group.get(setting) for group in optimizer.param_groups):
        raise OptimizerError(f"{type(optimizer).__name__}({setting}=True) has no counterpart; switch {setting} off")


def _to_adamw(optimizer: torch.optim.Optimizer) -> AdamW:
    def state_of(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
        step = float(state["step"])
        return {
            "exp_avg": state["exp_avg"].float(),
            "exp_avg_sq": state["exp_avg_sq"].float(),
            "beta_products": torch.tensor([beta**step for beta in group["betas"]], dtype=torch.float64),
            "step": torch.tensor(int(step)),
        }

    return _convert(optimizer, AdamW, ("lr", "betas", "eps", "weight_decay", "maximize"), state_of)


def _to_sgd(optimizer: torch.optim.Optimizer) -> SGD:
    def state_of(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
        if group["momentum"] == 0.0 or state.get("momentum_buffer") is None:
            return {}
        # torch's SGD counts no steps; the buffer is what tells that there was one
        return {"momentum_buffer": state["momentum_buffer"].float(), "step": torch.tensor(1)}

    settings = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    return _convert(optimizer, SGD, settings, state_of)


def _convert(
    optimizer: torch.optim.Optimizer,
    kind: type[Any],
    settings: tuple[str, ...],
    state_of: Callable[[dict[str, Any], dict[str, Any]], dict[str, Tensor]],
) -> Any:
    # what else a group holds is a scheduler's or the user's, and goes along
    dropped = {"foreach", "capturable", "differentiable", "fused", "amsgrad", "decoupled_weight_decay"}
    groups = [{k: v for k, v in group.items() if k not in dropped} for group in optimizer.param_groups]
    converted = kind(groups, **{name: optimizer.defaults[name] for name in settings})
    for group in converted.param_groups:
        for param in group["params"]:
            old = optimizer.state.get(param)
            if old:
                new = {key: value.to(param.device) for key, value in state_of(old, group).items()}
                converted.state[param].update(new)
    return converted
