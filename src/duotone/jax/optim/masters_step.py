"""One step of `masters`: gradients are read once, the inner optimizer updates FP32 masters, or everything stays.

Whether the loss itself was finite, which the loss scale has to know, is in the gradients of `value_and_grad`, or in the
extra argument `value`, as Optax calls a loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duotone.errors import OptimizerError
from duotone.jax.loss_marks import is_marked
from duotone.jax.loss_scale import after_step, warn_if_no_loss_was_scaled
from duotone.jax.optim.agreement import AxisName
from duotone.jax.optim.exact_update import ExactUpdate, OpaqueUpdate, exact_update
from duotone.jax.optim.gradients import check_gradient, for_inner, read_gradients
from duotone.jax.optim.leaves import check_dtype, is_split, is_trained, widened
from duotone.jax.optim.pieces import update_in_pieces
from duotone.jax.optim.state import MastersState
from duotone.jax.optim.surroundings import check_surroundings
from duotone.jax.trees import is_equinox_module, leaves_of
from duotone.jax.weights.codec import encode
from duotone.policy import Policy


@dataclass(frozen=True)
class MastersStep:
    """Parameters, gradients and tails as flat lists that fit each other.

    Attributes:
        params: the leaves of the parameters.
        grads: as many gradients; of leaves that are not trained, whatever there is.
        tails: as many tails; None for leaves without.
        structure: of the parameters.
        state: before the step.
        clip_norm: the largest norm that the inner optimizer sees.
        axis_name: what ranks agree over where JAX does not know which gradients differ.
        kind: of the updates of 16-bit weights.
    """

    params: Sequence[Any]
    grads: Sequence[Any]
    tails: Sequence[Any]
    structure: Any
    state: MastersState
    clip_norm: float | jax.Array | None
    axis_name: AxisName
    kind: type[ExactUpdate]

    @classmethod
    def read(
        cls,
        params: Any,
        grads: Any,
        state: MastersState,
        policy: Policy,
        clip_norm: float | jax.Array | None,
        axis_name: AxisName = None,
    ) -> "MastersStep":
        """Return a step, checked.

        Raises:
            OptimizerError: gradients, parameters and state do not fit each other, or gradients were not unscaled.
        """
        leaves, structure = jax.tree.flatten(params)
        found = leaves_of(params)
        paths = [leaf.path for leaf in found]
        tails = _like(
            params, structure, state.tails, "the tails in the state of masters", "made by tx.init of these parameters"
        )
        flat = _like(params, structure, grads, "the gradients", "of these parameters")
        for path, leaf, tail, grad in zip(paths, leaves, tails, flat, strict=True):
            check_dtype(path, leaf, policy)
            _check_tail(path, leaf, tail, policy)
            check_gradient(path, leaf, grad, is_scaled=not state.settings.is_none)
        if not state.settings.is_none and not any(tail is not None for tail in tails):
            warn_if_no_loss_was_scaled()
        check_surroundings(params, [tail is not None for tail in tails])
        kind = OpaqueUpdate if _has_equinox_module(params) else ExactUpdate
        return cls(leaves, flat, tails, structure, state, clip_norm, axis_name, kind)

    def apply(self, update: Callable[..., tuple[Any, Any]], extra: dict[str, Any]) -> tuple[Any, MastersState]:
        """Return the updates, like the parameters, and the state after the step."""
        trained = [grad for leaf, grad in zip(self.params, self.grads, strict=True) if is_trained(leaf)]
        # what XLA does not know: a loss scale is always more than 0
        # finite masters beyond FP16's largest number were rounded to Inf
        may_be_infinite = [getattr(leaf, "dtype", None) == jnp.float16 for leaf in self.params if is_trained(leaf)]
        weights = [leaf for leaf in self.params if getattr(leaf, "dtype", None) == jnp.float16]
        norm, non_finite, loss_is_finite, infinite = read_gradients(
            trained,
            ~is_marked(trained) & jnp.isfinite(extra.get("value", 0.0)).all(),
            weights=weights,
            axis_name=self.axis_name,
            is_true=self.state.loss_scale.scale > 0,
        )
        found_inf = non_finite.any()
        multiplier = None if self.clip_norm is None else jnp.minimum(1.0, self.clip_norm / norm)
        is_split_leaf = [tail is not None for tail in self.tails]

        def move(
            weights: list[Any], tails: list[Any], inner: Any
        ) -> tuple[tuple[list[Any], list[Any], Any], list[Any]]:
            """Return new weights, tails and inner state, and what is to be added to all other leaves."""
            rest = iter(zip(weights, tails, strict=True))
            leaves = [
                next(rest) if split else (leaf, None) for leaf, split in zip(self.params, is_split_leaf, strict=True)
            ]
            wide = [widened(*leaf) for leaf in leaves]
            true = [for_inner(grad, master, multiplier) for grad, master in zip(self.grads, wide, strict=True)]
            unflatten = self.structure.unflatten
            changes, new_inner = update(unflatten(true), inner, unflatten(wide), **extra)
            flat = self.structure.flatten_up_to(changes)
            pairs = [
                _moved(*leaf, master, change, found_inf)
                for leaf, master, change in zip(leaves, wide, flat, strict=True)
            ]
            kept = jax.tree.map(lambda new, old: _kept(found_inf, old, new), new_inner, inner)
            new, others = _parted(pairs, is_split_leaf)
            return ([weight for weight, _ in new], [tail for _, tail in new], kept), [change for change, _ in others]

        weights, _ = _parted(self.params, is_split_leaf)
        tails, _ = _parted(self.tails, is_split_leaf)
        moved = list(map(jnp.asarray, weights)), tails, self.state.inner
        (weights, tails, inner), others = update_in_pieces(lambda moved: move(*moved), moved, ~found_inf)
        exact = [exact_update(weight, kind=self.kind) for weight in weights]
        state = replace(
            self.state,
            tails=self.structure.unflatten(_joined(tails, [None] * len(others), is_split_leaf)),
            inner=inner,
            loss_scale=after_step(self.state.settings, self.state.loss_scale, found_inf, loss_is_finite),
            grad_norm=norm,
            found_inf=found_inf,
            non_finite=non_finite,
            infinite=jnp.zeros(len(trained), bool).at[np.flatnonzero(may_be_infinite)].set(infinite),
            loss_is_finite=loss_is_finite,
            last_scale=self.state.loss_scale.scale,
            overflows_at_floor=self._overflows_at_floor(found_inf & loss_is_finite),
        )
        return self.structure.unflatten(_joined(exact, others, is_split_leaf)), state

    def _overflows_at_floor(self, overflow: jax.Array) -> jax.Array:
        """Return how many steps in a row have overflowed where the scale can fall no further; 0 if it cannot move."""
        settings, before = self.state.settings, self.state.overflows_at_floor
        if not settings.is_dynamic:
            return before
        is_at_floor = self.state.loss_scale.scale <= settings.min_scale
        return jnp.where(overflow & is_at_floor, before + 1, 0)


def _parted(values: Sequence[Any], where: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """Return the values where it is so, and the others."""
    pairs = list(zip(values, where, strict=True))
    return [value for value, is_so in pairs if is_so], [value for value, is_so in pairs if not is_so]


def _joined(values: Sequence[Any], others: Sequence[Any], where: Sequence[bool]) -> list[Any]:
    """Return what `_parted` parted."""
    both = {True: iter(values), False: iter(others)}
    return [next(both[is_so]) for is_so in where]


def _moved(leaf: Any, tail: Any, master: Any, change: Any, found_inf: jax.Array) -> tuple[Any, Any]:
    """Return a 16-bit weight and its tail after the step, or what is to be added to another leaf, and None."""
    if master is None:
        return jnp.zeros_like(leaf), None
    change = jnp.zeros_like(master) if change is None else change
    if tail is None:
        return _kept(found_inf, jnp.zeros_like(change), change), None
    weight, new_tail = encode(jnp.asarray(master + change).astype(jnp.float32), leaf.dtype)
    return jnp.where(found_inf, leaf, weight), jnp.where(found_inf, tail, new_tail)


def _kept(found_inf: jax.Array, old: Any, new: Any) -> Any:
    """Return `old` after an overflow, else `new`, whose dtype it has."""
    dtype = getattr(new, "dtype", None)
    if dtype is not None and not jnp.issubdtype(dtype, jax.dtypes.extended):
        old = jnp.asarray(old, dtype)
    return jnp.where(found_inf, old, new)


def _like(params: Any, structure: Any, tree: Any, what: str, needed: str) -> list[Any]:
    """Return the leaves of a tree that has the parameters' structure."""
    try:
        return structure.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        own, others = ({leaf.path for leaf in leaves_of(each)} for each in (params, tree))
        differing = sorted(own ^ others)
        example = f' (only one of them has "{differing[0]}")' if differing else ""
        raise OptimizerError(
            f"{what} have another structure than the parameters{example}; give tx.update what was {needed}"
        ) from error


def _check_tail(path: str, leaf: Any, tail: Any, policy: Policy) -> None:
    if is_split(leaf) and tail is None:
        raise OptimizerError(
            f'parameter "{path}" is {leaf.dtype}, but the state has no tail of it: it was to stay float32 when tx.init '
            f'saw it; cast the parameters with duotone.jax.cast(params, "{policy.name}"), or call tx.init after the '
            "cast"
        )
    if tail is not None and not is_split(leaf):
        raise OptimizerError(
            f'parameter "{path}" is {getattr(leaf, "dtype", type(leaf).__name__)}, but the state holds the tail of a '
            f"{policy.param} weight; after tx.init, cast the parameters: params = duotone.jax.cast(params, "
            f'"{policy.name}"). Where cast keeps it float32 by its class, which a state of NNX does not show, write '
            f'a rule: "{path}: param=float32"'
        )
    if tail is not None and jnp.shape(tail) != jnp.shape(leaf):
        raise OptimizerError(
            f'parameter "{path}" has shape {jnp.shape(leaf)}, but its tail in the state {jnp.shape(tail)}; call '
            "tx.init anew for parameters of other shapes"
        )


def _has_equinox_module(tree: Any) -> bool:
    nodes = jax.tree.leaves(tree, is_leaf=is_equinox_module)
    return any(map(is_equinox_module, nodes))
