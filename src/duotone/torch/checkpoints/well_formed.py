"""Whether what was read from a checkpoint has the form of one: right digests say that nothing changed, no more.

Checked before anything is loaded, so that a folder of another program's, or of a hostile hand, is refused in a sentence
and changes nothing. Whether it fits a model is `contents`' part.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duotone.errors import CheckpointError, DuotoneError
from duotone.policy import Policy
from duotone.torch.kernels import SPLIT_DTYPES

# what earlier versions do not write
_OPTIONAL = frozenset({"average", "buffers", "tied", "random_of_other_ranks"})


def check_contents(path: object, contents: Mapping[str, Any], left_out: tuple[str, ...] = ()) -> None:
    """Raise unless contents are made as `save_checkpoint` makes them.

    Args:
        path: of the checkpoint, for the message.
        contents: of `folder.read_folder` or `shard_files.read_folder`.
        left_out: parts that were not read.

    Raises:
        CheckpointError: a part is missing, or of another form.

    >>> check_contents("last", {"policy": None, "model": {}})
    Traceback (most recent call last):
    duotone.errors.CheckpointError: last has no "tails", so save_checkpoint did not write it; use another checkpoint
    """
    for name, has_form in _FORMS.items():
        if name in left_out or (name in _OPTIONAL and name not in contents):
            continue
        if name not in contents:
            raise CheckpointError(
                f'{path} has no "{name}", so save_checkpoint did not write it; use another checkpoint'
            )
        try:
            holds = has_form(contents[name])
        # whatever a generator or a policy finds wrong with a state
        except (DuotoneError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError):
            holds = False
        if not holds:
            raise CheckpointError(
                f'"{name}" of {path} is not what save_checkpoint writes there; use another checkpoint'
            )
    _check_tails(path, contents["model"], contents["tails"])
    unknown = [name for name in contents.get("tied", {}).values() if name not in contents["model"]]
    if unknown:
        raise CheckpointError(f'{path} ties a weight to "{unknown[0]}", which it does not have; use another checkpoint')


def check_like(path: object, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise unless settings and counts in the state of an optimizer or a scaler have the types of its own.

    Args:
        path: of the checkpoint, for the message.
        state: that was loaded.
        own: the state before that.

    Raises:
        CheckpointError: one has another.
    """
    if "param_groups" in own:
        pairs, is_number = zip(state["param_groups"], own["param_groups"], strict=True), _is_number
    else:
        pairs = [(state.get(name), part) for name, part in own.items() if isinstance(part, dict)]
        is_number = _is_count
    for saved, before in pairs:
        for name in before.keys() - {"params"}:
            value = _member(saved, name)
            if not _is_like(value, before[name], is_number):
                raise CheckpointError(
                    f"{path} does not fit: {name} is {value!r:.60} there and {before[name]!r:.60} here; use another "
                    "checkpoint"
                )


def _member(saved: Any, name: str) -> Any:
    return saved.get(name) if isinstance(saved, dict) else None


def _is_like(value: Any, own: Any, is_number: Callable[[Any, Any], bool]) -> bool:
    if isinstance(own, list | tuple):
        items = isinstance(value, list | tuple) and len(value) == len(own)
        return items and all(_is_like(one, other, is_number) for one, other in zip(value, own, strict=True))
    if value is None:
        # a switch that earlier versions do not know, or leave to the optimizer
        return own is None or isinstance(own, bool)
    if own is None or isinstance(own, bool | int | float | Tensor):
        return is_number(value, own)
    return isinstance(value, type(own))


def _is_number(value: Any, own: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_count(value: Any, own: Any) -> bool:
    if isinstance(own, float):
        return _is_number(value, own)
    return isinstance(value, int) and 0 <= value < 2**31


def _check_tails(path: object, model: Mapping[str, Tensor], tails: Mapping[str, Tensor]) -> None:
    for name, tail in tails.items():
        weight = model.get(name)
        fits = weight is not None and weight.shape == tail.shape and weight.dtype in SPLIT_DTYPES
        if not fits or tail.dtype != torch.int16:
            raise CheckpointError(f'the tail of "{name}" in {path} does not fit its weight; use another checkpoint')


def _maps(keys: type, values: type | tuple[type, ...]) -> Callable[[Any], bool]:
    def has_form(part: Any) -> bool:
        return isinstance(part, dict) and all(isinstance(k, keys) and isinstance(v, values) for k, v in part.items())

    return has_form


def _lists(values: type) -> Callable[[Any], bool]:
    return lambda part: isinstance(part, list) and all(isinstance(each, values) for each in part)


def _or_none(has_form: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda part: part is None or has_form(part)


def _is_policy(part: Any) -> bool:
    return isinstance(part, str) and Policy.from_json(part) is not None


def _is_optimizer(part: Any) -> bool:
    if not _maps(str, object)(part) or not isinstance(part.get("duotone", {}), dict):
        return False
    groups, states = part["param_groups"], part["state"]
    are_groups = _lists(dict)(groups) and all(_lists(int)(group["params"]) for group in groups)
    # what a torch optimizer keeps for all parameters together stands under names
    are_states = isinstance(states, dict) and all(isinstance(key, int | str) for key in states)
    return are_groups and are_states and all(isinstance(states[key], dict) for key in states if isinstance(key, int))


def _are_parameters(part: Any) -> bool:
    return _lists(list)(part) and all(_lists(str)(names) for names in part)


def _are_random_states(part: Any) -> bool:
    """Try the states on generators of their own: there is no other judge of them."""
    if not isinstance(part, dict):
        return False
    torch.Generator().set_state(part["torch"])
    version, internal, gauss = part["python"]
    random.Random().setstate((version, tuple(internal), gauss))
    name, keys, *rest = part["numpy"]
    np.random.RandomState(0).set_state((name, np.array(keys, dtype=np.uint32), *rest))
    return _lists(Tensor)(part["cuda"])


_FORMS: Mapping[str, Callable[[Any], bool]] = {
    "policy": _or_none(_is_policy),
    "model": _maps(str, Tensor),
    "tails": _maps(str, Tensor),
    "buffers": _lists(str),
    "tied": _maps(str, str),
    "optimizer": _or_none(_is_optimizer),
    "optimizer_parameters": _or_none(_are_parameters),
    "scaler": _or_none(_maps(str, object)),
    "scheduler": _or_none(_maps(str, object)),
    "average": _or_none(_maps(str, object)),
    "random": _are_random_states,
    "random_of_other_ranks": lambda part: isinstance(part, list) and all(map(_are_random_states, part)),
    "progress": _maps(str, object),
}
