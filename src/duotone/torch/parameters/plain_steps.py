"""What would go wrong in silence when an optimizer's own `step` is called, looked at once for each optimizer.

A plain step is one that no scaler of Duotone makes. It is right for Duotone's optimizers, which keep masters, as long
as nothing scales the loss. It goes wrong in three ways: an optimizer without masters updates 16-bit weights that have
some; a policy asks for a loss scale, and there is none; gradients still carry a loss scale (`scaled_losses`).

torch calls the hook before every step of every optimizer. It is registered with the first cast or the first scaler,
never by an import.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from duotone.call_site import warn
from duotone.errors import OptimizerError
from duotone.torch.kernels import SPLIT_DTYPES, Rounding
from duotone.torch.kernels.uncompiled import uncompiled
from duotone.torch.parameters.edits import steps
from duotone.torch.parameters.scaled_losses import (
    WALKS,
    check_true_gradients,
    is_called_by_scaler,
    parameters_of,
    said_of,
    scaled_losses,
)
from duotone.torch.parameters.storage import storage_changes, storage_of

# what a scaler gives to the step of an optimizer that takes the scale out by itself
_OF_SCALERS = frozenset(("grad_multiplier", "found_inf"))
# torch neither copies nor pickles what is set on an optimizer
_SEEN = "_duotone_seen"
_WAY_OUT = (
    "use duotone.torch.AdamW, SGD or Lion, duotone.torch.MasterWeights(optimizer), or "
    "duotone.torch.prepare(model, optimizer, policy) before the first step"
)
# torch's own, none of whose steps takes gradients in another dtype than the weights'; of others, fused ones take none
_ONE_DTYPE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
_needs_gradient = attrgetter("requires_grad")
_registered: list[Any] = []


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an optimizer was like when it was looked at.

    Attributes:
        changes: `storage_changes()`.
        groups: how many parameter groups it had.
        frozen: its cast parameters that needed no gradient.
    """

    changes: int
    groups: int
    frozen: list[Tensor]


def watch_plain_steps() -> None:
    """Have every optimizer looked at before its steps, from now on; a second call changes nothing."""
    if not _registered:
        _registered.append(register_optimizer_step_pre_hook(_before_step))


def ignore_plain_steps(optimizer: torch.optim.Optimizer) -> None:
    """Leave an optimizer alone that somebody else refuses to step."""
    said = said_of(optimizer)
    said.masters = said.scale = True
    said.walks = WALKS


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    # called in every step: all that is done for one that was looked at is these few comparisons
    if not torch.compiler.is_compiling():
        steps[0] += 1
    if kwargs and not _OF_SCALERS.isdisjoint(kwargs):
        return
    seen = optimizer.__dict__.get(_SEEN)
    if scaled_losses:
        check_true_gradients(optimizer)
    if (
        seen is None
        or seen.changes != storage_changes()
        or seen.groups != len(optimizer.param_groups)
        or (seen.frozen and any(map(_needs_gradient, seen.frozen)))
    ):
        _look_at(optimizer)


@uncompiled
def _look_at(optimizer: torch.optim.Optimizer) -> None:
    said = said_of(optimizer)
    cast = [param for param in parameters_of(optimizer) if storage_of(param).param is not None]
    frozen = [param for param in cast if not param.requires_grad]
    vars(optimizer)[_SEEN] = _Seen(storage_changes(), len(optimizer.param_groups), frozen)
    updated = [param for param in cast if param.requires_grad]
    if not said.masters and not _keeps_masters(optimizer):
        said.masters = _say_if_updates_are_lost(optimizer, updated)
    if not said.scale and any(storage_of(param).loss_scale not in (None, "none", 1.0) for param in updated):
        said.scale = _say_if_nothing_scales(optimizer)


def say_if_updates_are_rounded(optimizer: torch.optim.Optimizer) -> None:
    """Warn, once for each optimizer, if one of torch's own updates 16-bit weights that were never cast.

    Other libraries' may round in a way of their own.
    """
    said = said_of(optimizer)
    bases = [kind for kind in type(optimizer).__mro__ if kind not in (torch.optim.Optimizer, object)]
    if said.rounded or not any(kind.__module__.startswith("torch.optim.") for kind in bases):
        return
    said.rounded = True
    rounded = [
        param
        for param in parameters_of(optimizer)
        if param.dtype in SPLIT_DTYPES and storage_of(param).param is None and param.grad is not None
    ]
    if rounded:
        warn(
            f"{type(optimizer).__name__} rounds updates of weights in {rounded[0].dtype}, so that small ones are lost: "
            f"nobody keeps FP32 masters of them; {_WAY_OUT}"
        )


def _keeps_masters(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer keeps FP32 masters, or one that it wraps does."""
    return any(getattr(each, "keeps_masters", None) is True for each in (optimizer, *vars(optimizer).values()))


def _say_if_updates_are_lost(optimizer: torch.optim.Optimizer, updated: Iterable[Tensor]) -> bool:
    """Warn if one of the parameters that it updates has a master or is to be rounded; return whether one is.

    Raises:
        OptimizerError: it could not update them at all.
    """
    name = type(optimizer).__name__
    updated = list(updated)
    _check_gradients_fit(optimizer, updated)
    for param in updated:
        rounding = storage_of(param).rounding
        if param.dtype not in SPLIT_DTYPES or rounding == Rounding.NEAREST:
            continue
        if rounding is None:
            warn(
                f"this {name} updates weights in {param.dtype} and not their FP32 masters, so that small updates are "
                f"lost; {_WAY_OUT}"
            )
        else:
            warn(
                f"the policy rounds updates of weights in {param.dtype} stochastically, but this {name} rounds them to "
                f"nearest, so that small updates are lost; {_WAY_OUT}"
            )
        return True
    return False


def _check_gradients_fit(optimizer: torch.optim.Optimizer, updated: Iterable[Tensor]) -> None:
    """Raise if torch's step would fail, in words of its kernels, for gradients have another dtype than weights.

    Raises:
        OptimizerError: it would.
    """
    is_torchs = type(optimizer).__module__.startswith("torch.optim.")
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    if not is_torchs or not (is_fused or type(optimizer) in _ONE_DTYPE):
        return
    for param in updated:
        if param.grad is not None and param.dtype in SPLIT_DTYPES and param.grad.dtype != param.dtype:
            raise OptimizerError(
                f"this {type(optimizer).__name__} takes gradients in the dtype of the weights alone, but "
                f'"{storage_of(param).name}" is in {param.dtype} and its gradient in {param.grad.dtype}, as the policy '
                f"says; {_WAY_OUT}"
            )


def _say_if_nothing_scales(optimizer: torch.optim.Optimizer) -> bool:
    """Warn of a step that no scaler makes; return whether that is so."""
    # torch's scalers set it on a fused optimizer for the time of a step
    if "found_inf" in vars(optimizer) or is_called_by_scaler():
        return False
    warn(
        f"the model's policy scales the loss, for small gradients become 0 in float16, but no scaler made this step of "
        f"{type(optimizer).__name__}; use scaler.backward(loss) and scaler.step(optimizer) of "
        "duotone.torch.LossScaler, or cast to a policy with loss_scale=1 to go without on purpose"
    )
    return True
