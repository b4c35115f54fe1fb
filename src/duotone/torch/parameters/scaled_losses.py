"""Losses that were scaled and whose scale nobody has taken out yet, so that no optimizer's own step applies it.

A scaler that runs the backward pass itself knows a gradient that it made, and that this is still the same is proof.
Of a loss that others take backward, its graph tells whether it reaches an optimizer's parameters, as long as somebody
holds it. Nothing here keeps a scaler, a loss or a gradient alive.
"""

import sys
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from duotone.call_site import warn
from duotone.errors import OptimizerError
from duotone.torch.internals.autograd import version_of
from duotone.torch.kernels.uncompiled import uncompiled
from duotone.torch.parameters.storage import storage_of

# torch neither copies nor pickles what is set on an optimizer
_SAID = "_duotone_said"
# how often one optimizer's gradients are traced back to scaled losses
WALKS = 3
# how far the graph of a loss is searched for a gradient, in every backward pass of a scaler
_NODES = 64
# a parameter, its gradient, and how often that was written to
Evidence = tuple["ref[Tensor]", "ref[Tensor]", int]


class Scaled(NamedTuple):
    """A loss that a scaler has scaled, a gradient that it made, if that is known, and the scaler."""

    loss: "ref[Tensor]"
    evidence: Evidence | None
    scaler: "ref[Any]"


# by the id of the scaler: the last one, until it takes the scale out
scaled_losses: dict[int, Scaled] = {}


@dataclass(slots=True)
class Said:
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


def said_of(optimizer: torch.optim.Optimizer) -> Said:
    """Return what was said of an optimizer."""
    return vars(optimizer).setdefault(_SAID, Said())


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters of all groups of an optimizer."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def is_called_by_scaler() -> bool:
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
def check_true_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Raise if a loss that was scaled has gone backward into an optimizer's parameters, and nobody has unscaled them.

    It is known of a loss that a scaler itself took backward, and of others as long as somebody holds them.

    Raises:
        OptimizerError: it has.
    """
    said = said_of(optimizer)
    for key, (weak, evidence, scaler) in list(scaled_losses.items()):
        loss = weak()
        is_gone = loss is None and (evidence is None or evidence[1]() is None)
        if is_gone:
            scaled_losses.pop(key, None)
        if is_gone and scaler() is None:
            # of a run that is over
            continue
        if said.walks >= WALKS or is_called_by_scaler():
            continue
        said.walks += 1
        grads = {id(param): param.grad for param in parameters_of(optimizer) if param.grad is not None}
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
            said.walks = WALKS
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


def _say_if_one_was_scaled(optimizer: torch.optim.Optimizer, said: Said) -> None:
    """Warn, once, of a step of a model that needs a loss scale, after a loss was scaled that nobody holds now."""
    if said.scale or all(storage_of(param).loss_scale in (None, "none", 1.0) for param in parameters_of(optimizer)):
        return
    said.scale = True
    warn(
        f"a loss was scaled since the last step, and its scale was not taken out before this step of "
        f"{type(optimizer).__name__}; step with scaler.step(optimizer), or call scaler.unscale_(optimizer) first"
    )


def forget_zeroed(params: Iterable[Tensor]) -> None:
    """Forget the scaled losses whose gradients were those of some parameters, which are zeros now."""
    ids = set(map(id, params))
    for key, (_, evidence, _) in list(scaled_losses.items()):
        if evidence is not None and id(evidence[0]()) in ids:
            scaled_losses.pop(key, None)


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
