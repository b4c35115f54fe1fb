"""What would go wrong in silence when an optimizer's own `step` is called, looked at once for each optimizer.

A plain step is one that no scaler of Duotone makes. It is right for Duotone's optimizers, which keep masters, as long
as nothing scales the loss. It goes wrong in three ways: an optimizer without masters updates 16-bit weights that have
some; a policy asks for a loss scale, and there is none; gradients still carry a loss scale.

torch calls the hook before every step of every optimizer. It is registered with the first cast or the first scaler,
never by an import.
"""

import sys
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from duotone.errors import OptimizerError
from duotone.torch.call_site import warn
from duotone.torch.internals.autograd import version_of
from duotone.torch.kernels import SPLIT_DTYPES, Rounding
from duotone.torch.kernels.uncompiled import uncompiled
from duotone.torch.parameters.edits import steps
from duotone.torch.parameters.storage import storage_changes, storage_of

# what a scaler gives to the step of an optimizer that takes the scale out by itself
_OF_SCALERS = frozenset(("grad_multiplier", "found_inf"))
# torch neither copies nor pickles what is set on an optimizer
_SEEN, _SAID = "_duotone_seen", "_duotone_said"
# how often one optimizer's gradients are traced back to scaled losses
_WALKS = 3
_WAY_OUT = (
    "use duotone.torch.AdamW, SGD or Lion, duotone.torch.MasterWeights(optimizer), or "
    "duotone.torch.prepare(model, optimizer, policy) before the first step"
)
_needs_gradient = attrgetter("requires_grad")
_registered: list[Any] = []
# how far the graph of a loss is searched for a gradient, in every backward pass of a scaler
_NODES = 64
# a parameter, its gradient, and how often that was written to
Evidence = tuple["ref[Tensor]", "ref[Tensor]", int]
# the last loss that each scaler, by its id, has scaled and not yet taken the scale out of; and a gradient that it made
scaled_losses: dict[int, tuple["ref[Tensor]", Evidence | None]] = {}


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


@dataclass(slots=True)
class _Said:
    """What was said of an optimizer, once.

    Attributes:
        masters: that it updates cast weights without their masters.
        rounded: that it rounds updates of weights that were never cast.
        scale: that nothing scales the loss.
        walks: how often its gradients were traced back to scaled losses.
    """

    masters: bool = False
    rounded: bool = False
    scale: bool = False
    walks: int = 0


def watch_plain_steps() -> None:
    """Have every optimizer looked at before its steps, from now on; a second call changes nothing."""
    if not _registered:
        _registered.append(register_optimizer_step_pre_hook(_before_step))


def ignore_plain_steps(optimizer: torch.optim.Optimizer) -> None:
    """Leave an optimizer alone that somebody else refuses to step."""
    vars(optimizer)[_SAID] = _Said(masters=True, scale=True, walks=_WALKS)


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    # called in every step: all that is done for one that was looked at is these few comparisons
    if not torch.compiler.is_compiling():
        steps[0] += 1
    if kwargs and not _OF_SCALERS.isdisjoint(kwargs):
        return
    seen = optimizer.__dict__.get(_SEEN)
    if scaled_losses:
        _check_true_gradients(optimizer)
    if (
        seen is None
        or seen.changes != storage_changes()
        or seen.groups != len(optimizer.param_groups)
        or (seen.frozen and any(map(_needs_gradient, seen.frozen)))
    ):
        _look_at(optimizer)


@uncompiled
def _look_at(optimizer: torch.optim.Optimizer) -> None:
    said: _Said = vars(optimizer).setdefault(_SAID, _Said())
    cast = [param for param in _parameters(optimizer) if storage_of(param).param is not None]
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
    said: _Said = vars(optimizer).setdefault(_SAID, _Said())
    bases = [kind for kind in type(optimizer).__mro__ if kind not in (torch.optim.Optimizer, object)]
    if said.rounded or not any(kind.__module__.startswith("torch.optim.") for kind in bases):
        return
    said.rounded = True
    rounded = [
        param
        for param in _parameters(optimizer)
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


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _say_if_updates_are_lost(optimizer: torch.optim.Optimizer, updated: Iterable[Tensor]) -> bool:
    """Warn if one of the parameters that it updates has a master or is to be rounded; return whether one is."""
    name = type(optimizer).__name__
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


def _say_if_nothing_scales(optimizer: torch.optim.Optimizer) -> bool:
    """Warn of a step that no scaler makes; return whether that is so."""
    # torch's scalers set it on a fused optimizer for the time of a step
    if "found_inf" in vars(optimizer) or _is_called_by_scaler():
        return False
    warn(
        f"the model's policy scales the loss, for small gradients become 0 in float16, but no scaler made this step of "
        f"{type(optimizer).__name__}; use scaler.backward(loss) and scaler.step(optimizer) of "
        "duotone.torch.LossScaler, or cast to a policy with loss_scale=1 to go without on purpose"
    )
    return True


def _is_called_by_scaler() -> bool:
    """Return whether the step is inside the `step` of something that unscales gradients and is not switched off."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "step":
            caller = frame.f_locals.get("self")
            is_enabled = getattr(caller, "is_enabled", None)
            if hasattr(type(caller), "unscale_") and (is_enabled is None or is_enabled()):
                return True
        frame = frame.f_back
    return False


@uncompiled
def _check_true_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Raise if a loss that was scaled has gone backward into an optimizer's parameters, and nobody has unscaled them.

    It is known of a loss that a scaler itself took backward, and of others as long as somebody holds them.

    Raises:
        OptimizerError: it has.
    """
    said: _Said = vars(optimizer).setdefault(_SAID, _Said())
    for scaler, (weak, evidence) in list(scaled_losses.items()):
        loss = weak()
        is_gone = loss is None and (evidence is None or evidence[1]() is None)
        if is_gone:
            scaled_losses.pop(scaler, None)
        if said.walks >= _WALKS or _is_called_by_scaler():
            continue
        said.walks += 1
        grads = {id(param): param.grad for param in _parameters(optimizer) if param.grad is not None}
        param = None if evidence is None else evidence[0]()
        if evidence is not None and param is not None and id(param) in grads:
            grad, version = grads[id(param)], evidence[2]
            if grad is not evidence[1]() or storage_of(param).in_full_precision:
                # it was let go of, and this one comes from another loss; or full_precision refuses the step
                continue
            is_same = version_of(grad) == version
        elif loss is None:
            if is_gone and evidence is None and grads:
                _say_if_one_was_scaled(optimizer, said)
            continue
        elif _reaches(loss, grads):
            is_same = not all(map(version_of, grads.values()))
        else:
            continue
        if not is_same:
            # somebody has written into all of them, for one to take the scale out by hand
            said.walks = _WALKS
            warn(
                f"the gradients of this {type(optimizer).__name__} may carry the loss scale, and its own step applies "
                "them as they are; step with scaler.step(optimizer), or call scaler.unscale_(optimizer) in place of "
                "dividing them by hand"
            )
        else:
            said.walks = 0
            raise OptimizerError(
                f"the gradients of this {type(optimizer).__name__} carry the loss scale, and its own step would apply "
                "them as they are; step with scaler.step(optimizer), or call scaler.unscale_(optimizer) first"
            )


def _say_if_one_was_scaled(optimizer: torch.optim.Optimizer, said: _Said) -> None:
    """Warn, once, of a step of a model that needs a loss scale, after a loss was scaled that nobody holds now."""
    if said.scale or all(storage_of(param).loss_scale in (None, "none", 1.0) for param in _parameters(optimizer)):
        return
    said.scale = True
    warn(
        f"a loss was scaled since the last step, and its scale was not taken out before this step of "
        f"{type(optimizer).__name__}; step with scaler.step(optimizer), or call scaler.unscale_(optimizer) first"
    )


def gradient_of(loss: Tensor) -> Evidence | None:
    """Return a parameter that a loss has gone backward to, near its end, and its gradient; None if there is none."""
    seen, left = 0, [loss.grad_fn]
    while left and seen < _NODES:
        node = left.pop()
        seen += 1
        if node is None:
            continue
        param = getattr(node, "variable", None)
        if param is not None and param.grad is not None:
            return ref(param), ref(param.grad), version_of(param.grad)
        left += [each for each, _ in node.next_functions]
    return None


def _reaches(loss: Tensor, params: Container[int]) -> bool:
    """Return whether the gradient of a loss goes to one of some parameters, by their ids."""
    found, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if id(getattr(node, "variable", None)) in params:
            return True
        left += [each for each, _ in node.next_functions]
    return False
