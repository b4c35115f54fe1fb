"""What an optimizer's update is: its settings, what it keeps, and its arithmetic, which the compiled kernels repeat.

An update is two functions. `coefficients` computes in FP64 what all elements of a parameter share, from settings and
counters; it is rounded once to FP32. `apply` computes an element's new master and moments in FP32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from duotone.torch.kernels.slots import FLOAT64, MAX_MOMENTS, STEP, Slot

# what `coefficients` returns: a `NamedTuple` of numbers and 0-d tensors, and the new counters
Coefficients = tuple[Any, tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Update:
    """The update of an optimizer.

    Attributes:
        name: of the files in `cpu/updates` and `cuda/updates` that repeat it.
        settings: a `NamedTuple` of a parameter group's settings: `lr` first, then numbers, `maximize` and `seed` last.
        coefficient_names: a `NamedTuple` of what `coefficients` computes, by which every backend names it.
        moments: the slots of the weight's shape, in the order in which `apply` takes them; optional ones last.
        counters: the slot of what `coefficients` takes and returns, numbers in FP64; None without.
        coefficients: of settings, step and counters, the coefficients and new counters.
        apply: of true gradient, FP32 master, FP32 moments and coefficients, the new master and moments.
    """

    name: str
    settings: type[NamedTuple]
    coefficient_names: type[NamedTuple]
    moments: tuple[Slot, ...]
    counters: Slot | None
    coefficients: Callable[[Any, Tensor, tuple[Tensor, ...]], Coefficients]
    apply: Callable[[Tensor, Tensor, tuple[Tensor, ...], Any], tuple[Tensor, tuple[Tensor, ...]]]

    def __post_init__(self) -> None:
        fields = self.settings._fields
        assert (fields[0], *fields[-2:]) == ("lr", "maximize", "seed"), fields
        assert len(self.moments) <= MAX_MOMENTS, self.moments
        assert self.counters is None or (self.counters.format == FLOAT64 and self.counters.is_counter), self.counters
        # kernels tell by their number which moments there are
        optional = [slot.needs is not None for slot in self.moments]
        assert optional == sorted(optional), self.moments

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All that is kept for a parameter, its tail apart."""
        return (STEP, *self.moments, *([] if self.counters is None else [self.counters]))

    @cached_property
    def counter_count(self) -> int:
        """How many numbers the counters are."""
        return 0 if self.counters is None or self.counters.shape is None else self.counters.shape[0]

    def names_in(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the slots that are there under the settings of a parameter group.

        >>> from duotone.torch.kernels.updates import sgd
        >>> sgd.UPDATE.names_in({"momentum": 0.0}), sgd.UPDATE.names_in({"momentum": 0.9})
        (('step',), ('step', 'momentum_buffer'))
        """
        names = self._always
        # asked at every step
        for setting, name in self._optional:
            if group[setting]:
                names += (name,)
        return names

    def moments_in(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the moments among them, in the order of `moments`."""
        return tuple(slot.name for slot in self.moments if slot.is_needed(group))

    @cached_property
    def _always(self) -> tuple[str, ...]:
        return tuple(slot.name for slot in self.slots if slot.needs is None)

    @cached_property
    def _optional(self) -> tuple[tuple[str, str], ...]:
        return tuple((slot.needs, slot.name) for slot in self.slots if slot.needs is not None)
