"""What of Optax stands around `masters`, and after it in a chain: refused by its name where it computes with updates.

An update of a 16-bit weight can only be added to it (see `exact_update`). What averages, masks or flattens updates
fails on them in words about pytrees, or, as a mask of zeros does, stops a weight and not its master. Optax calls what
it wraps from closures, which tell what they are by the names of the functions that made them; so the calls that lead
here are gone through, as far as they are Optax's. Left out: functions of the user's own, on which an update refuses
arithmetic.
"""

import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import jax
import optax

from duotone.errors import OptimizerError
from duotone.jax.trees import leaves_of

# between a wrapper of Optax and what it wraps
_LIBRARIES = {"optax", "jax", "functools", "contextlib"}
# what cannot stand around, and may stand inside
_INSIDE = {"apply_if_finite", "conditionally_mask", "conditionally_transform", "flatten", "mechanize", "sam"}
_INSIDE |= {"schedule_free"}
# what gives updates as they are, or is the user's own
_PASSES = {"identity", "masters", "monitor", "snapshot", "stateless"}


def check_surroundings(params: Any, is_split: Sequence[bool]) -> None:
    """Raise if a function of Optax that called this one cannot take updates of 16-bit weights.

    Args:
        params: of `masters`; what `optax.masked` keeps from it is a `MaskedNode`.
        is_split: for each leaf of them, whether it is a 16-bit weight.

    Raises:
        OptimizerError: such a function is around `masters`, or after it in a chain.
    """
    if not any(is_split):
        return
    for frame in _callers():
        name, module = _maker(frame.f_code.co_qualname), frame.f_globals["__name__"]
        if name in _INSIDE:
            whole = f"optax.contrib.{name}" if ".contrib" in module else f"optax.{name}"
            hint = ", or leave it out: masters skips such steps itself" if name == "apply_if_finite" else ""
            raise OptimizerError(
                f"{whole} cannot stand around masters, whose updates of 16-bit weights can only be added to them; put "
                f"it inside, masters({whole}(...), policy){hint}"
            )
        if name == "lookahead":
            raise OptimizerError(
                "optax.lookahead takes two sets of weights, which masters cannot have in 16 bits; keep the weights in "
                'FP32, as policy "bf16-mixed" does, or leave lookahead out'
            )
        if name in ("chain", "named_chain"):
            for update in _later(frame):
                _check_later(update, frame.f_locals.get("params"), params, is_split)


def _check_later(update: Any, whole: Any, params: Any, is_split: Sequence[bool]) -> None:
    update = _itself(update)
    name, closure = _maker(update.__qualname__), _closure(update)
    if not update.__module__.startswith("optax.") or name in _PASSES:
        return
    if name in ("chain", "named_chain"):
        for each in closure.get("update_fns") or [tx.update for _, tx in closure["transforms"]]:
            _check_later(each, whole, params, is_split)
    elif name == "masked":
        (held,) = _names(closure["inner"])
        stopped = [] if held in _PASSES else _masked(closure.get("mask"), whole, params, is_split)
        if stopped:
            raise _refusal("freeze" if held == "set_to_zero" else f"masked(optax.{held})", f' of "{stopped[0]}"')
    elif name != "partition" or not _names(*closure["transforms"].values()) <= _PASSES:
        raise _refusal(name, "")


def _refusal(name: str, of: str) -> OptimizerError:
    return OptimizerError(
        f"optax.{name} stands after masters in a chain, but updates{of} can only be added to 16-bit weights, whose "
        f"masters have moved by them already; put it inside, masters(optax.chain(..., optax.{name}), policy)"
    )


def _masked(mask: Any, whole: Any, params: Any, is_split: Sequence[bool]) -> list[str]:
    """Return the paths of 16-bit weights of `masters` that a mask holds for."""
    found = mask(whole) if callable(mask) else mask
    flags = jax.tree.leaves(jax.tree.map(lambda flag, part: jax.tree.map(lambda _: bool(flag), part), found, whole))
    own = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if len(flags) != len(own):
        return []
    weights = iter(zip(leaves_of(params), is_split, strict=True))
    pairs = [(flag, next(weights)) for flag, leaf in zip(flags, own, strict=True) if not _is_masked(leaf)]
    return [leaf.path for flag, (leaf, split) in pairs if flag and split]


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _callers() -> Iterator[FrameType]:
    """Yield the frames of Optax that lead to this module, innermost first, as far as libraries call each other."""
    frame = sys._getframe(1)
    while frame is not None:
        root = frame.f_globals.get("__name__", "").partition(".")[0]
        if root == "optax":
            yield frame
        elif root not in _LIBRARIES and root != "duotone":
            return
        frame = frame.f_back


def _later(frame: FrameType) -> list[Any]:
    """Return the updates that come after the present one in a chain."""
    names = frame.f_locals
    if "fn" in names:
        updates, own = list(names.get("update_fns", ())), names["fn"]
        return updates[updates.index(own) + 1 :] if own in updates else []
    pairs = list(names.get("transforms", ()))
    places = [place for place, (name, _) in enumerate(pairs) if name == names.get("name")]
    return [tx.update for _, tx in pairs[places[0] + 1 :]] if places else []


def _maker(qualified: str) -> str:
    """Return the name of the function or class that made a function.

    >>> _maker("chain.<locals>.update_fn"), _maker("MultiSteps.update.<locals>._do_update")
    ('chain', 'MultiSteps')
    """
    return qualified.partition(".")[0]


def _names(*transformations: Any) -> set[str]:
    return {_maker(_itself(each.update).__qualname__) for each in transformations}


def _itself(update: Any) -> Any:
    """Return an update without what Optax puts around it to take extra arguments away."""
    while _maker(update.__qualname__) == "with_extra_args_support":
        update = _closure(update)["tx"].update
    return update


def _closure(function: Any) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    return {name: cell.cell_contents for name, cell in cells}
