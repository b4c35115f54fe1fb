"""An existing model and torch optimizer made Duotone's: all three mechanisms in one call, or the optimizer alone."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from duotone.errors import OptimizerError
from duotone.policy import Policy
from duotone.torch.casting.cast import cast
from duotone.torch.internals.training import PRE_HOOKS, move_step_hooks
from duotone.torch.kernels import SPLIT_DTYPES
from duotone.torch.optim import OWN, FusedOptimizer, MasterOptimizer, MasterWeights, check_parameters, check_wrappable
from duotone.torch.parameters.plain_steps import ignore_plain_steps
from duotone.torch.parameters.storage import storage_of
from duotone.torch.scaling.loss_scaler import LossScaler


class Prepared(NamedTuple):
    """A model, an optimizer and a scaler that fit one policy."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: LossScaler


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, policy: Policy | str) -> Prepared:
    """Cast a model, convert its torch optimizer, and make the scaler: `cast`, `convert_optimizer` and `LossScaler`.

    Args:
        model: a module; cast in place.
        optimizer: its optimizer; see `convert_optimizer`. Use the returned one from here on.
        policy: a policy or its text.

    Returns:
        `(model, optimizer, scaler)`.

    Raises:
        PolicyError: as `cast` does.
        OptimizerError: the optimizer can neither be replaced nor wrapped, or would keep moments in another dtype than
            the policy; or model and optimizer are swapped. The model is unchanged then.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    >>> model, optimizer, scaler = prepare(model, optimizer, "bf16")
    >>> type(optimizer).__module__, optimizer.param_groups[0]["lr"]
    ('duotone.torch.optim.adamw', 0.0003)
    """
    _check_order(model, optimizer)
    policy = Policy.parse(policy)
    _check_convertible(optimizer, policy)
    model = cast(model, policy)
    return Prepared(model, convert_optimizer(optimizer), LossScaler(policy))


def convert_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an optimizer with FP32 masters that goes on where a torch optimizer is.

    Hyper-parameters, parameter groups, state and hooks are taken over. `torch.optim.AdamW` and `SGD` become Duotone's
    own. Any other optimizer, and AdamW with amsgrad, is wrapped in `MasterWeights` if some of its weights are 16-bit;
    if all are FP32, it is returned as it is, and so is an optimizer of Duotone's.

    Call it after `cast`, and after `fully_shard` or `data_parallel` if there are several ranks.

    Args:
        optimizer: a torch optimizer. Use the returned one from here on: one that was replaced or wrapped refuses to
            step. Schedulers may be built on either, for both share their groups.

    Raises:
        OptimizerError: the optimizer can neither be replaced nor wrapped, or would keep moments in another dtype than
            the policy that its parameters were cast to.

    >>> import duotone.torch as dt
    >>> model = dt.cast(nn.Linear(2, 1), "bf16")
    >>> optimizer = convert_optimizer(torch.optim.AdamW(model.parameters(), lr=3e-4))
    >>> type(optimizer).__module__, optimizer.param_groups[0]["lr"]
    ('duotone.torch.optim.adamw', 0.0003)
    """
    if isinstance(optimizer, MasterOptimizer):
        return optimizer
    params = _parameters(optimizer)
    counterpart = _counterpart(optimizer)
    if counterpart is not None:
        check_parameters(params)
        return _taken_over(optimizer, counterpart)
    _check_moments(optimizer, {str(storage_of(param).state).removeprefix("torch.") for param in params}, "the policy")
    # a lazily shaped parameter is cast when it gets its shape
    if any(param.dtype in SPLIT_DTYPES or isinstance(param, UninitializedParameter) for param in params):
        return MasterWeights(optimizer)
    return optimizer


def _check_order(model: object, optimizer: object) -> None:
    if isinstance(model, torch.optim.Optimizer) or isinstance(optimizer, nn.Module):
        raise OptimizerError(
            f"prepare takes (model, optimizer, policy), but got a {type(model).__name__} in place of the model and a "
            f"{type(optimizer).__name__} in place of the optimizer; swap them: model, optimizer, scaler = "
            "prepare(model, optimizer, policy)"
        )
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer) and not hasattr(optimizer, PRE_HOOKS):
        name = type(inner).__name__
        raise OptimizerError(
            f"a {type(optimizer).__name__} is a framework's wrapper around the {name} in it; prepare the model and the "
            f"{name}, and give the framework what prepare returns"
        )


def _check_convertible(optimizer: torch.optim.Optimizer, policy: Policy) -> None:
    """Raise if `convert_optimizer` would raise once the model is cast.

    Raises:
        OptimizerError: it would.
    """
    if isinstance(optimizer, MasterOptimizer):
        return
    if _counterpart(optimizer) is not None:
        check_parameters(_parameters(optimizer))
        return
    _check_moments(optimizer, _formats(policy, "state"), f'policy "{policy.name}"')
    if _formats(policy, "param") != {"float32"}:
        check_wrappable(optimizer)


def _counterpart(optimizer: torch.optim.Optimizer) -> type[FusedOptimizer] | None:
    """Return Duotone's optimizer of the same update; None if there is none."""
    return next((kind for kind in OWN if kind.replaces(optimizer)), None)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _formats(policy: Policy, role: str) -> set[str]:
    """Return the formats of a role in a policy and its rules."""
    return {getattr(policy, role), *filter(None, (dict(rule.roles).get(role) for rule in policy.rules))}


def _check_moments(optimizer: torch.optim.Optimizer, formats: set[str], who: str) -> None:
    if formats - {"float32"}:
        raise OptimizerError(
            f"{who} keeps moments in bfloat16, but {type(optimizer).__name__} keeps them in float32; "
            "use a policy with state=float32, or AdamW or SGD"
        )


def _taken_over(optimizer: torch.optim.Optimizer, kind: type[FusedOptimizer]) -> torch.optim.Optimizer:
    """Return an optimizer of another kind with a torch optimizer's settings, groups, state and hooks."""
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    own = inspect.signature(kind).parameters
    converted: Any = kind(groups, **{name: value for name, value in optimizer.defaults.items() if name in own})
    converted.load_portable_state_dict(optimizer.state_dict())
    # whoever holds the old one, a scheduler for instance, changes the groups of the new one
    optimizer.param_groups = converted.param_groups
    move_step_hooks(optimizer, converted)
    ignore_plain_steps(optimizer)
    optimizer.register_step_pre_hook(_refuse)
    return converted


def _refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    raise OptimizerError(
        f"this {type(optimizer).__name__} was replaced by one with FP32 masters; step the optimizer that prepare or "
        "convert_optimizer returned"
    )
