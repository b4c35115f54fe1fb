"""Lets `flax.serialization` write and read the state of `masters`: train states are saved with it.

Flax knows dicts, lists and named tuples, but no other dataclasses than its own. It is told of ours when a state is made
and Flax is loaded; it is never imported here.
"""

import sys
from dataclasses import fields, replace
from typing import Any

from duotone.jax.optim.state import STRUCTURE, MastersState
from duotone.loss_scale import LossScaleState


def register_with_flax() -> None:
    """Tell Flax, if it is loaded, how the states of `masters` and of loss scales are written and read."""
    serialization = sys.modules.get("flax.serialization")
    if serialization is None:
        return

    def written(state: Any) -> dict[str, Any]:
        return {name: serialization.to_state_dict(getattr(state, name)) for name in _names(state)}

    def read(state: Any, saved: dict[str, Any]) -> Any:
        return replace(
            state,
            **{
                name: serialization.from_state_dict(getattr(state, name), saved[name], name=name)
                for name in _names(state)
            },
        )

    for kind in (MastersState, LossScaleState):
        serialization.register_serialization_state(kind, written, read, override=True)


def _names(state: Any) -> list[str]:
    return [field.name for field in fields(state) if field.name not in STRUCTURE]
