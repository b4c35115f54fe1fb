"""All three mechanisms put into an existing model and torch optimizer with one call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from duotone.errors import OptimizerError
from duotone.policy import Policy
from duotone.torch.casting.cast import cast
from duotone.torch.optim import SGD, AdamW, MasterOptimizer, MasterWeights, check_parameters, check_wrappable
from duotone.torch.scaling.loss_scaler import LossScaler


class Prepared(NamedTuple):
    """A model, an optimizer and a scaler that fit one policy."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: LossScaler


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, policy: Policy | str) -> Prepared:
    """Cast a model, give its torch optimizer FP32 masters, and make the scaler.

    Hyper-parameters, parameter groups and state are taken over. `torch.optim.AdamW` and `SGD` become Duotone's own; any
    other optimizer, and AdamW with amsgrad, is kept if the policy's weights are FP32, and wrapped in `MasterWeights` if
    some are 16-bit.

    Args:
        model: a module; cast in place.
        optimizer: its optimizer; a Duotone optimizer is kept. Use the returned one from here on. Schedulers may be
            built on either, for both share their groups.
        policy: a policy or its text.

    Returns:
        `(model, optimizer, scaler)`.

    Raises:
        PolicyError: as `cast` does.
        OptimizerError: the optimizer can neither be replaced nor wrapped, or would keep moments in another dtype than
            the policy. The model is unchanged then.

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
    if type(optimizer) is torch.optim.AdamW and not any(group["amsgrad"] for group in optimizer.param_groups):
        check_parameters(params)
        return lambda theirs: _taken_over(theirs, AdamW, ("lr", "betas", "eps", "weight_decay", "maximize"))
    if type(optimizer) is torch.optim.SGD:
        check_parameters(params)
        settings = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return lambda theirs: _taken_over(theirs, SGD, settings)
    _check_moments(optimizer, policy)
    if policy.param == "float32" and not policy.rules:
        return lambda kept: kept
    check_wrappable(optimizer)
    return MasterWeights


def _check_moments(optimizer: torch.optim.Optimizer, policy: Policy) -> None:
    formats = {policy.state, *(dict(rule.roles).get("state") for rule in policy.rules)} - {None}
    if formats != {"float32"}:
        raise OptimizerError(
            f'policy "{policy.name}" keeps moments in bfloat16, but {type(optimizer).__name__} keeps them in float32; '
            "use a policy with state=float32, or AdamW or SGD"
        )


def _taken_over(optimizer: torch.optim.Optimizer, kind: type[AdamW | SGD], settings: tuple[str, ...]) -> Any:
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    converted = kind(groups, **{name: optimizer.defaults[name] for name in settings})
    converted.load_portable_state_dict(optimizer.state_dict())
    # whoever holds the old one, a scheduler for instance, changes the groups of the new one
    optimizer.param_groups = converted.param_groups
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        getattr(converted, hooks).update(getattr(optimizer, hooks))
    # torch's schedulers warn if their optimizer has not been stepped
    optimizer._opt_called = True  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(_refuse)
    return converted


def _refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    raise OptimizerError(
        f"this {type(optimizer).__name__} was replaced by prepare; step the optimizer that prepare returned"
    )
