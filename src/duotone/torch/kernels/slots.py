"""What an optimizer keeps for a parameter, declared once: whoever makes, saves, counts or cuts states reads it here.

A slot is one tensor of a parameter's state. A moment has an element for each weight, in the format that the policy
says (`state`) unless the slot has one of its own; a counter has a shape of its own and is the same on every rank. Where
a format keeps one FP32 scale for each block of elements, these are a second tensor beside the first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# random bits are drawn in four streams: one for the weight, one for each of at most three moments
MAX_MOMENTS = 3


@dataclass(frozen=True)
class StateFormat:
    """How the elements of a slot are stored.

    Attributes:
        dtype: of an element.
        block: how many elements, in the order of memory, share one FP32 scale; 0 for none.
    """

    dtype: torch.dtype
    block: int = 0


INT64 = StateFormat(torch.int64)
FLOAT64 = StateFormat(torch.float64)
# what kernels read and write of a policy's `state`, by its name there
STATE_FORMATS = {"float32": StateFormat(torch.float32), "bfloat16": StateFormat(torch.bfloat16)}


@dataclass(frozen=True)
class Slot:
    """One tensor that an optimizer keeps for a parameter.

    Attributes:
        name: in the parameter's state.
        format: how it is stored; None for the policy's `state`.
        shape: of a counter; None for the parameter's own.
        start: what every element is before the first update.
        needs: the setting of a group that must not be 0 or False for the slot to be there; None if it always is.
        after: of a counter: returns what it is after some updates under some settings; None where that is not known.
    """

    name: str
    format: StateFormat | None = None
    shape: tuple[int, ...] | None = None
    start: float = 0.0
    needs: str | None = None
    after: Callable[[int, Any], Any] | None = None

    @property
    def is_counter(self) -> bool:
        """Whether it has a shape of its own, so that it is never cut over ranks."""
        return self.shape is not None

    @property
    def follows_policy(self) -> bool:
        """Whether the policy says how it is stored."""
        return self.format is None

    @property
    def scales_name(self) -> str:
        """The name of the tensor of its scales, where its format has any."""
        return f"{self.name}_scales"

    def is_needed(self, group: Mapping[str, Any]) -> bool:
        """Return whether it is there under the settings of a parameter group."""
        return self.needs is None or bool(group[self.needs])

    def tensors(self, shape: torch.Size, state: StateFormat) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Return dtype and shape of every tensor that it takes, by name: its own, and that of its scales.

        Args:
            shape: the parameter's.
            state: the policy's format of states.

        >>> Slot("exp_avg").tensors(torch.Size((30, 20)), StateFormat(torch.int8, block=256))
        {'exp_avg': (torch.int8, torch.Size([30, 20])), 'exp_avg_scales': (torch.float32, torch.Size([3]))}
        """
        stored = self.format or state
        own = shape if self.shape is None else torch.Size(self.shape)
        tensors = {self.name: (stored.dtype, own)}
        if stored.block:
            tensors[self.scales_name] = (torch.float32, torch.Size((-(-own.numel() // stored.block),)))
        return tensors


# how often a parameter has been updated: random bits depend on it
STEP = Slot("step", INT64, shape=(), after=lambda steps, settings: steps)
