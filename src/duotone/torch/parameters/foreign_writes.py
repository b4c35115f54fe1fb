"""What other code writes into 16-bit weights where no optimizer steps, seen where it is lost, and warned of once.

Decays, noise and steps made by hand are smaller than half a unit of 16 bits as a rule, and rounded away. A step would
see them (`optim.edit_watch`), but there may be none. So a weight is looked at where Duotone is asked for masters, and
in every `WINDOW`th forward pass: torch counts the writes (its version), and checksums say whether they changed a bit.

- Many writes without a forward pass between them: a loop over the weights.
- Other values in one window after the other, and no step at all: training by hand.
- Other values in one copy of the model after the other, which Duotone has not written: averages with what copies learn.

Left out: writes through `weight.data` that change no bit, which nothing shows; compiled forward passes.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from duotone.call_site import warn
from duotone.torch.internals.autograd import in_transform
from duotone.torch.internals.training import gathering_of
from duotone.torch.kernels.checksums import sums_of_cells
from duotone.torch.kernels.layout import dense
from duotone.torch.parameters.edits import (
    checksums_of,
    is_edited,
    note_versions,
    passes,
    steps,
    versions_of,
    writes_since,
)
from duotone.torch.parameters.shards import is_sharded, local
from duotone.torch.parameters.storage import storage_of

# forward passes between two looks
WINDOW = 16
# writes in a row that are warned of: if they changed nothing, and if they did, for a weight may be filled row by row
MANY, VERY_MANY = 64, 256
# writes in a window that are a step, or a trial there and back, in each of its forward passes
_STEPS, _TRIALS = 12, 24
# how often values are read, which waits for the device, where torch has counted no writes
_READS = 4

UNITS = {torch.bfloat16: "bfloat16 (1/512 to 1/256 of a weight)", torch.float16: "float16 (1/4096 to 1/2048)"}
_WAY_OUT = 'inside "with duotone.torch.full_precision(model):", where weights are their FP32 masters'


@torch.no_grad()
def say_if_written(params: Iterable[Tensor]) -> None:
    """Warn, once for a weight, if other code has written to one of a model's parameters many times in a row."""
    for param in params:
        writes = writes_since(param)
        if writes >= MANY and _say_of_writes(param, writes):
            return


def _say_of_writes(param: Tensor, writes: int) -> bool:
    """Warn of writes in a row if they came to nothing, or are very many; return whether it was said."""
    storage = storage_of(param)
    # they are many only once
    note_versions(param)
    name = storage.name
    which = "a 16-bit weight" if name is None else f'"{name}"'
    units = UNITS[param.dtype]
    if not is_edited(param):
        warn(
            f"other code has written to {which} {writes} times in a row, without a step of an optimizer, and changed "
            f"not one bit: if it was to change some, that was smaller than half a unit of {units} and was rounded "
            f"away; make such changes {_WAY_OUT}"
        )
    elif writes >= VERY_MANY:
        warn(
            f"other code has written to {which} {writes} times in a row, without a step of an optimizer, and each time "
            f"it was rounded to {units}: of many small changes little or nothing is left; make them {_WAY_OUT}"
        )
    else:
        return False
    return True


class PassWatch:
    """Counts the forward passes of a cast model, and looks now and then at its largest weight with a master."""

    def __init__(self) -> None:
        self._passes = self._reads = 0
        self._weight: ref[Tensor] | None = None
        # how often it was written, and how many steps there were, at the last look
        self._before = (0, -1)
        # its checksums at the last look, if it was not as Duotone wrote it
        self._sums: Tensor | None = None
        # as the model was last copied: its checksums as Duotone wrote it last, and as it was
        self._at_copy: tuple[Tensor, Tensor] | None = None
        self._has_warned = False

    def __reduce__(self) -> Any:
        # a copy has weights of its own
        return PassWatch, ()

    def count(self, model: nn.Module) -> bool:
        """Count a forward pass that is about to begin, unless it is compiled, and return whether it is the first."""
        if torch.compiler.is_compiling():
            return False
        passes[0] += 1
        self._passes += 1
        if not (self._passes % WINDOW or self._has_warned):
            self._look(model)
        return self._passes == 1

    @torch.no_grad()
    def look_at_copy(self, model: nn.Module) -> None:
        """Look at the weights of a model that is being copied."""
        weight = None if self._has_warned else self._watched(model)
        before, self._at_copy = self._at_copy, None
        tail = None if weight is None else storage_of(weight).tail
        if weight is None or tail is None or not is_edited(weight):
            return
        written, sums = checksums_of(weight, tail)[:-1].clone(), _sums_of(weight)
        self._at_copy = written, sums
        if before is not None and torch.equal(before[0], written) and not torch.equal(before[1], sums):
            self._has_warned = True
            warn(
                f'other code changes 16-bit weights ("{storage_of(weight).name}" is one) from one copy of the model to '
                f"the next, as Reptile does: each time they are rounded to {UNITS[weight.dtype]}, and small changes "
                f"are lost; make them {_WAY_OUT}",
                between=("copy",),
            )

    def _watched(self, model: nn.Module) -> Tensor | None:
        """Return the weight that is looked at, or None if there is none, or it cannot be read now."""
        weight = None if self._weight is None else self._weight()
        if weight is None or storage_of(weight).tail is None:
            weight = _largest(model)
            self._weight = None if weight is None else ref(weight)
        if weight is None or in_transform() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        return weight

    def _look(self, model: nn.Module) -> None:
        weight = self._watched(model)
        if weight is None:
            return
        before, self._before = self._before, (versions_of(weight), steps[0])
        trains = torch.is_grad_enabled() and model.training
        with torch.no_grad():
            say_if_written((weight,))
            if before[1] == steps[0]:
                self._compare(weight, self._before[0] - before[0], trains=trains)
            else:
                self._sums = None
        note_versions(weight)

    def _compare(self, weight: Tensor, writes: int, *, trains: bool) -> None:
        """Warn if a weight is not as Duotone wrote it, at this look and the last one, and not what it was then."""
        sums, self._sums = self._sums, None
        if writes < (_STEPS if trains else _TRIALS):
            # `weight.data` is written to without being counted
            if not trains or self._reads >= _READS:
                return
            self._reads += 1
        tail = storage_of(weight).tail
        if tail is None or not is_edited(weight):
            return
        self._sums = _sums_of(weight)
        if sums is None or torch.equal(sums, self._sums):
            return
        self._has_warned = True
        name = storage_of(weight).name
        warn(
            f'other code changes 16-bit weights ("{name}" is one) between forward passes, without a step of an '
            f"optimizer: each time they are rounded to {UNITS[weight.dtype]}, and small changes are lost; train with "
            "duotone.torch.AdamW, SGD or Lion, which update FP32 masters, or make the changes "
            f"{_WAY_OUT}"
        )


def _sums_of(weight: Tensor) -> Tensor:
    flat = dense(local(weight.detach()))
    return sums_of_cells(flat.as_strided((flat.numel(),), (1,)))


def _largest(model: nn.Module) -> Tensor | None:
    """Return the largest of a model's parameters with a tail, those apart that its own forward pass writes to."""
    own = {id(module.weight) for module in model.modules() if getattr(module, "max_norm", None) is not None}
    # in a forward pass sharded modules hold what was gathered
    sharded = chain.from_iterable(gathering_of(module) for module in model.modules() if is_sharded(module))
    parts = (each.sharded_param for _, of_group in sharded for each in of_group)
    params = (param for param in chain(model.parameters(), parts) if not param.is_meta and id(param) not in own)
    return max((param for param in params if storage_of(param).tail is not None), key=Tensor.numel, default=None)
