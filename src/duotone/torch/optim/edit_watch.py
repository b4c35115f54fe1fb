"""Warns once of an optimizer's weights that other code keeps changing between steps (`parameters.edits`).

Steps follow such changes, and one of them, a loaded state dict or pruning, is nothing to warn of. But where it is many,
the masters lose their lower bits again and again, as 16-bit weights without masters do. So steps leave marks on the
device, one bit for each of `WINDOW` steps, which are read once in a window: on an accelerator a window later, so that
nothing waits. A change that is rounded away leaves no mark, but a version of the weight; one weight after the other is
asked for that, one in a step, so that a step costs the same however many there are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duotone.call_site import warn
from duotone.torch.kernels import Edits
from duotone.torch.kernels.checksums import CELL
from duotone.torch.parameters.edits import checksums_of, note_versions, recorded, versions_of
from duotone.torch.parameters.foreign_writes import UNITS
from duotone.torch.parameters.shards import local
from duotone.torch.parameters.storage import storage_of
from duotone.torch.readback import Readback

WINDOW = 16
# changes within a window that are warned of
REPEATED = 3

_WAY_OUT = (
    'inside "with duotone.torch.full_precision(model):", where weights are their FP32 masters, or, if the module '
    "makes them itself, as nn.Embedding(max_norm=...) does, keep its weights in FP32, by a rule "
    '"{}: param=float32"; said once'
)


class EditWatch:
    """Follows the edits that the steps of one optimizer notice."""

    def __init__(self) -> None:
        self._steps = 0
        self._seen: dict[torch.device, tuple[Tensor, Readback]] = {}
        # the weight that is looked at next, and how it looked after the last step
        self._asked: tuple[Tensor, tuple[int, int, int]] | None = None
        self._writes_in_a_row = 0
        self._has_warned = False

    def on(self, device: torch.device) -> Edits | None:
        """Return where a step notes edits of weights on a device; None if nobody reads that any more."""
        if self._has_warned:
            return None
        if device not in self._seen:
            self._seen[device] = torch.zeros((), dtype=torch.int32, device=device), Readback()
        return Edits(self._seen[device][0], 1 << self._steps % WINDOW)

    def before_step(self) -> None:
        """Look whether somebody has written to a weight since the last step."""
        if self._asked is not None:
            weight, (versions, *place) = self._asked
            versions_now, *place_now = _look(weight)
            # one that was written twice or lies elsewhere may have got its old values back, as SAM gives them back
            is_written = versions_now == versions + 1 and place_now == place
            self._writes_in_a_row = self._writes_in_a_row + 1 if is_written else 0

    def after_step(self, split: Sequence[Tensor]) -> None:
        """Count a step, and warn at the end of a window.

        Args:
            split: the parameters with a tail.
        """
        if self._has_warned or not split:
            return
        self._steps += 1
        weight = split[self._steps % len(split)]
        note_versions(weight)
        self._asked = weight, _look(weight)
        if self._steps % WINDOW == 0:
            self._read_marks(split)

    def _read_marks(self, split: Sequence[Tensor]) -> None:
        marks = 0
        for seen, readback in self._seen.values():
            if seen.is_cuda and torch.cuda.is_current_stream_capturing():
                return
            if not seen.is_cpu:
                marks |= (readback.receive() or [0])[0]
            readback.send(seen.reshape(1).clone())
            if seen.is_cpu:
                marks |= (readback.receive() or [0])[0]
            seen.zero_()
        if marks.bit_count() >= REPEATED:
            self._warn_of_changes(marks.bit_count(), split)
        elif not marks and self._writes_in_a_row >= WINDOW and self._asked is not None:
            self._warn_of_nothing(self._asked[0])
        if marks and not self._has_warned:
            for param in split:
                _marks_of(param).zero_()

    def _warn_of_changes(self, steps: int, split: Sequence[Tensor]) -> None:
        self._has_warned = True
        marked = [param for param in split if int(_marks_of(param)).bit_count() >= REPEATED]
        named = [name for param in marked if (name := storage_of(param).name) is not None]
        names = [f'"{name}"' for name in named]
        which = "" if not names else f" ({names[0]}{f' and {len(marked) - 1} more' if len(marked) > 1 else ''})"
        warn(
            f"other code has changed 16-bit weights{which} before {steps} of {WINDOW} steps: each time they became "
            f"their own masters, and they and up to {CELL - 1} neighbours lost the bits below their 16; make such "
            f"changes {_way_out(named[0] if named else None)}"
        )

    def _warn_of_nothing(self, weight: Tensor) -> None:
        self._has_warned = True
        name = storage_of(weight).name
        which = "a 16-bit weight" if name is None else f'"{name}"'
        warn(
            f"other code has written to {which} before each of the last {WINDOW} steps, and changed not one bit: if it "
            f"was to change some, that was smaller than half a unit of {UNITS[weight.dtype]} and was rounded away; "
            f"make such changes {_way_out(name)}"
        )


def _way_out(name: str | None) -> str:
    """Return what to do about changes of a weight, by its name in the model."""
    return _WAY_OUT.format("MODULE" if name is None or "." not in name else name.rpartition(".")[0])


def _look(weight: Tensor) -> tuple[int, int, int]:
    """Return how often a weight was written to, where it lies, and how often Duotone has recorded a weight."""
    return versions_of(weight), local(weight).data_ptr(), recorded[0]


def _marks_of(param: Tensor) -> Any:
    tail = storage_of(param).tail
    return torch.zeros((), dtype=torch.int32) if tail is None else checksums_of(param, tail)[-1]
