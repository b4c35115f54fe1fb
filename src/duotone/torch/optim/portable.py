"""The portable format of a state: what the torch optimizer of the same update keeps for FP32 weights.

Moments in FP32, step counts as torch keeps them, groups with every setting that torch expects, no tails: the masters
come with the weights, from `master_weights` and by `load_master_weights`. On the way back, what ours has no counterpart
for is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch.optim.base import listed

# settings by which torch's optimizers are wanted apart: what else a group holds may be a scheduler's or the user's
_KIND_SETTINGS = {
    "alpha",
    "beta2_decay",
    "betas",
    "dampening",
    "eps",
    "etas",
    "history_size",
    "lambd",
    "lr_decay",
    "momentum",
    "momentum_decay",
    "nesterov",
    "ns_steps",
    "rho",
}
# settings that say how a torch optimizer computes, not what
_IMPLEMENTATION = {"foreach", "capturable", "differentiable", "fused"}


@dataclass(frozen=True)
class PortableFormat:
    """How the torch optimizer of the same update keeps what one of ours keeps.

    Attributes:
        counterpart: that optimizer; None if torch has none.
        counts_steps: whether a step count goes with the moments.
        kind_settings: the settings that tell its kind.
        implementation: settings that its groups hold besides, and their defaults; ours has no use for them.
        fixed: settings of its groups for which ours stands with one value only.
    """

    counterpart: type[torch.optim.Optimizer] | None
    counts_steps: bool
    kind_settings: frozenset[str]
    implementation: Mapping[str, bool | None]
    fixed: Mapping[str, bool]


def portable_group(group: Mapping[str, Any], portable: PortableFormat) -> dict[str, Any]:
    """Return a group with all the settings that torch expects and none that it does not know."""
    kept = {name: value for name, value in group.items() if name != "seed"}
    return {**portable.implementation, **portable.fixed, **kept}


def portable_state(state: Mapping[str, Any], moments: Sequence[str], portable: PortableFormat) -> dict[str, Tensor]:
    """Return a parameter's state as torch keeps it; empty before its first update. Waits for the device.

    Args:
        state: as ours keeps it.
        moments: the names of those that it may hold.
        portable: how torch keeps it.
    """
    steps = float(state.get("step", 0))
    if steps == 0.0:
        return {}
    counted = {"step": torch.tensor(steps, dtype=torch.float32)} if portable.counts_steps else {}
    return counted | {name: state[name].to(torch.float32, copy=True) for name in moments if name in state}


def settings_from_portable(group: Mapping[str, Any], portable: PortableFormat, name: str) -> dict[str, Any]:
    """Return the settings of a portable or a torch group without those that ours does not know.

    Args:
        group: of a state dict. What it holds besides settings, a scheduler's `initial_lr` for instance, goes along.
        portable: of the optimizer.
        name: of the optimizer, for messages.

    Raises:
        OptimizerError: it is the group of another kind of optimizer, or has a setting without a counterpart.
    """
    given = _KIND_SETTINGS & group.keys()
    if given != portable.kind_settings:
        raise OptimizerError(
            f"the state is not one of {name}: its groups have {_joined(given)}, those of {name} have "
            f"{_joined(portable.kind_settings)}; load it into an optimizer of its own kind"
        )
    for setting, only in portable.fixed.items():
        if group.get(setting, only) != only:
            raise OptimizerError(
                f"the state was made with {setting}={group[setting]}, which has no counterpart in {name}; "
                f"allowed is {setting}={only}"
            )
    dropped = _IMPLEMENTATION | portable.fixed.keys()
    return {"maximize": False, **{key: value for key, value in group.items() if key not in dropped}}


def state_from_portable(
    state: Mapping[str, Any],
    param: Tensor,
    names: tuple[Sequence[str], Sequence[str]],
    portable: PortableFormat,
    where: str,
) -> tuple[int, dict[str, Tensor]]:
    """Return how often a parameter was updated and its moments, both as they are in a portable or a torch state.

    Args:
        state: as torch keeps it, plain, foreach, fused or capturable.
        param: the parameter, for its shape.
        names: of the moments that the parameter's group needs, and of all that there may be.
        portable: of the optimizer.
        where: whose state it is, for messages.

    Returns:
        The count, and the moments. Where steps are not counted, moments tell of at least 1; without them it is 0.

    Raises:
        OptimizerError: the state holds something else, or another shape.
    """
    moments = {name: value for name, value in state.items() if value is not None and name != "step"}
    if not moments and not portable.counts_steps:
        return 0, {}
    needed, every = map(set, names)
    fits = needed <= moments.keys() <= every and all(
        isinstance(value, Tensor) and value.is_floating_point() and value.shape == param.shape
        for value in moments.values()
    )
    if not fits or (portable.counts_steps and "step" not in state):
        wanted = [f"{name} {tuple(param.shape)}" for name in names[0] or names[1]] + ["step"] * portable.counts_steps
        raise OptimizerError(
            f"{where} holds {listed(state)}, needed is {', '.join(wanted)}; load the state of the same kind of "
            "optimizer on the same model"
        )
    return int(state.get("step", 1)), moments


def check_same_kind(optimizer: torch.optim.Optimizer, own: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Raise unless a group of a torch optimizer's state dict has the settings of the same kind of optimizer.

    Raises:
        OptimizerError: it has not.
    """
    name = type(optimizer).__name__
    wanted = optimizer.defaults.keys() - _IMPLEMENTATION - {"maximize"}
    missing = wanted - loaded.keys()
    foreign = _KIND_SETTINGS & (loaded.keys() - own.keys())
    if missing or foreign:
        raise OptimizerError(
            f"the state is not one of {name}: its groups lack {_joined(missing)} and have {_joined(foreign)} besides; "
            "load it into an optimizer of its own kind"
        )
    decoupled = [bool(group.get("decoupled_weight_decay")) for group in (own, loaded)]
    if decoupled[0] != decoupled[1]:
        raise OptimizerError(
            f"the state was made with decoupled_weight_decay={decoupled[1]}, this {name} has {decoupled[0]}; load it "
            "into an optimizer of its own kind"
        )


def keep_implementation(own: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a loaded group that computes in the way of the one that it replaces: foreach, fused and so on."""
    return {**loaded, **{name: own[name] for name in _IMPLEMENTATION if name in own}}


def check_same_state(optimizer: torch.optim.Optimizer, param: Tensor, loaded: Mapping[str, Any], index: int) -> None:
    """Raise unless a parameter's state from elsewhere may be one of this torch optimizer for this parameter.

    Raises:
        OptimizerError: it holds other things than the present state, or, in one of torch's own optimizers, a tensor
            that does not fit the parameter's shape.
    """
    own, name = optimizer.state.get(param), type(optimizer).__name__
    if own and own.keys() != loaded.keys():
        raise OptimizerError(
            f"the state of parameter {index} holds {listed(loaded)}, that of {name} {listed(own)}; "
            "load the state of the same kind of optimizer"
        )
    if type(optimizer).__module__.split(".")[:2] != ["torch", "optim"]:
        return
    for key, value in loaded.items():
        # what torch's optimizers keep is a scalar, or has the parameter's shape, or would have but for sums over it
        if isinstance(value, Tensor) and not _broadcasts(value.shape, param.shape):
            raise OptimizerError(
                f'"{key}" of parameter {index} has shape {tuple(value.shape)} in the state, the parameter '
                f"{tuple(param.shape)}; load the state of an optimizer of the same model"
            )


def _broadcasts(shape: torch.Size, wider: torch.Size) -> bool:
    return len(shape) <= len(wider) and all(
        own in (1, other) for own, other in zip(reversed(shape), reversed(wider), strict=False)
    )


def _joined(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
