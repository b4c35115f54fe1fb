"""The state of `masters`: tails, the inner optimizer's state, the loss scale, and what the last step did.

A pytree of arrays alone, so that it can be donated, sharded, scanned over and saved like any Optax state. What is
not an array is part of its structure: the settings of the loss scale and the policy's text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
from jax import tree_util

from duotone.errors import OptimizerError
from duotone.loss_scale import LossScale, LossScaleState


class Paths(tuple[str, ...]):
    """Paths of leaves, for messages: they belong to a structure, but do not tell two structures apart.

    Optax initialises an optimizer with a placeholder of parameters to find which parts of a state are like them
    (`optax.tree.map_params`), and compares the structures.

    >>> Paths(["a"]) == Paths() and hash(Paths(["a"])) == hash(Paths())
    True
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Paths)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(Paths)


@dataclass(frozen=True)
class MastersState:
    """The state of `masters`.

    Attributes:
        tails: like the parameters: int16 for each 16-bit weight, None for every other leaf.
        inner: the inner optimizer's state, made from the FP32 masters.
        loss_scale: typed scalars.
        grad_norm: float32, 0-d: the norm of the last true gradient, before clipping.
        found_inf: bool, 0-d: whether the last step was skipped, because a gradient held an Inf or a NaN.
        non_finite: bool, one for each of `paths`: whether the last gradient of that parameter was not finite.
        infinite: bool, one for each of `paths`: whether that weight held an Inf when the last step began, for the step
            before had moved its master beyond FP16's largest number.
        loss_is_finite: bool, 0-d: whether the last loss was a finite number.
        last_scale: float32, 0-d: the loss scale of the last step.
        overflows_at_floor: int32, 0-d: the last steps in a row that overflowed at the lowest loss scale.
        exact_starts: int32, 0-d: how many parameters were 16-bit already at `init`, and were taken as exact.
        settings: of the loss scale.
        policy: its text.
        paths: of the floating-point parameters.
    """

    tails: Any
    inner: Any
    loss_scale: LossScaleState
    grad_norm: jax.Array
    found_inf: jax.Array
    non_finite: jax.Array
    infinite: jax.Array
    loss_is_finite: jax.Array
    last_scale: jax.Array
    overflows_at_floor: jax.Array
    exact_starts: jax.Array
    settings: LossScale
    policy: str
    paths: Paths


# part of the structure, not among the leaves
STRUCTURE = ["settings", "policy", "paths"]
tree_util.register_dataclass(
    MastersState, [field.name for field in fields(MastersState) if field.name not in STRUCTURE], STRUCTURE
)


def states_in(state: Any) -> list[MastersState]:
    """Return every `MastersState` inside of an optimizer's state: a chain's, an `nnx.Optimizer`'s, a train state's."""
    nodes = tree_util.tree_leaves(state, is_leaf=lambda node: isinstance(node, MastersState))
    return [node for node in nodes if isinstance(node, MastersState)]


def state_in(state: Any) -> MastersState:
    """Return the one `MastersState` inside of an optimizer's state.

    Raises:
        OptimizerError: there is none, or there are several.
    """
    found = states_in(state)
    if not found:
        raise no_state_error(state)
    if len(found) > 1:
        # of several optimizers, which are asked one by one, or of the groups of one
        of_one = isinstance(state, Mapping) and [key for key, part in state.items() if len(states_in(part)) == 1]
        hint = (
            f"give that of one optimizer, such as state[{of_one[0]!r}]"
            if of_one
            else "give one of them, or put one masters around the whole optimizer: masters(optax.multi_transform(...), "
            "policy)"
        )
        raise OptimizerError(
            f"there are {len(found)} states of duotone.jax.masters in this {type(state).__name__}; {hint}"
        )
    return found[0]


def no_state_error(state: Any) -> OptimizerError:
    """Return the error of a state of another optimizer."""
    return OptimizerError(
        f"there is no state of duotone.jax.masters in this {type(state).__name__}; give the state that tx.init or "
        "tx.update returned, of an optimizer made by masters"
    )
