"""Averages of 16-bit weights that others keep, in 16 bits, where small steps are lost: noticed, and warned of once.

Nothing tells that a tensor is meant as an average, so two things are looked at. Classes that are known to average copy
a cast model when they are made. Any other average, of clones for instance, is a tensor of a weight's shape that
somebody writes in place between steps, again and again, and that comes near the weight without ever being it: a few
times in a run such tensors are looked for among all objects, and followed for some steps.

Writes are seen by values, for autograd's counts of versions leave out `tensor.data.lerp_`. The device is waited for
once then, if there is such a tensor at all. Of sharded weights each rank looks at its part.
"""

import gc
import sys
from collections.abc import Iterator, Mapping
from itertools import chain, count, pairwise
from types import FrameType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

from duotone.call_site import warn
from duotone.torch.kernels import SPLIT_DTYPES
from duotone.torch.kernels.uncompiled import uncompiled
from duotone.torch.parameters.edits import records_of
from duotone.torch.parameters.masters import read_master
from duotone.torch.parameters.shards import local
from duotone.torch.parameters.storage import storage_of

# whose constructors copy a model to average into the copy, and in which modules they are
_CLASSES = {
    "torch.optim.swa_utils": "AveragedModel",
    "timm.utils.model_ema": "timm's ModelEma",
    "ema_pytorch.ema_pytorch": "ema-pytorch's EMA",
}
# the steps of an optimizer before which tensors are looked for: 0.2 microseconds for each object of the process, so at
# most so often in all
_SCANS, _MOST_SCANS = (32, 1024), 4
# how many steps later what was found is read again, twice; how many of its elements are compared
_INTERVAL, _SAMPLE = 2, 4096
_STEPS, _CANDIDATES = "_duotone_steps", "_duotone_candidates"
_LAST = _SCANS[-1] + 2 * _INTERVAL
_KINDS = frozenset((Tensor, nn.Parameter))
_registered: list[Any] = []
_scans = count(1)
# the weights of whose averages it was said, by their `id`
_said: "dict[int, ref[Tensor]]" = {}
_WAY_OUT = (
    "where small steps are lost, or kept as noise; use duotone.torch.Average(model), which averages the FP32 masters"
)


def watch_foreign_averages() -> None:
    """Look before steps of every optimizer, from now on; a second call changes nothing."""
    if not _registered:
        _registered.append(register_optimizer_step_pre_hook(_before_step))


def say_if_copied_for_average(module: nn.Module) -> None:
    """Warn if a class that is known to average is copying a cast model."""
    weights = list(filter(_is_rounded, module.parameters()))
    # parts of a model are copied one by one
    if not weights or any(map(_is_known, weights)):
        return
    frame = sys._getframe(1)
    while frame is not None:
        name = _CLASSES.get(frame.f_globals.get("__name__", ""))
        if name is not None:
            _said.update({id(weight): ref(weight) for weight in weights})
            between = "copy", *(module.partition(".")[0] for module in _CLASSES)
            warn(f"{name} copies a cast model to average its 16-bit weights in 16 bits, {_WAY_OUT}", between)
            return
        frame = frame.f_back


def given_to_average(params: Iterator[nn.Parameter], frame: FrameType) -> Iterator[Any]:
    """Return a cast model's parameters as an average is to see them: torch's, made before the cast, their masters.

    Such an average is in FP32, and torch's kernels take no 16-bit weights beside it.

    Args:
        params: those of the model.
        frame: what has asked the model for them.
    """
    if frame.f_code.co_name != "update_parameters" or frame.f_globals.get("__name__") != AveragedModel.__module__:
        return params
    averaged: Any = frame.f_locals.get("self")
    if not isinstance(averaged, AveragedModel):
        return params
    pairs = zip(params, averaged.module.parameters(), strict=False)
    return (read_master(own) if _is_rounded(own) and kept.dtype == torch.float32 else own for own, kept in pairs)


class _Record:
    """What Duotone notes with a tensor when it writes it."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = storage_of(tensor)
        self._records = records_of(self._storage.tail)

    def is_still(self, tensor: Tensor) -> bool:
        """Return whether nothing was noted since."""
        storage = storage_of(tensor)
        return storage is self._storage and records_of(storage.tail) == self._records


class _Candidate:
    """A tensor that may be an average of a weight; the host reads its values once it was seen three times."""

    def __init__(self, tensor: Tensor, weight: Tensor) -> None:
        self._tensor, self._weight = ref(tensor), ref(weight)
        self._seen, self._record = [_sample(tensor).clone()], _Record(tensor)

    def look(self) -> None:
        """Remember what it holds now."""
        tensor = self._tensor()
        if tensor is not None and _has_memory(tensor):
            self._seen.append(_sample(tensor).clone())

    def is_average(self) -> bool:
        """Return whether it was written between any two looks, and is near the weight without being it."""
        tensor, weight = self._tensor(), self._weight()
        if tensor is None or weight is None or len(self._seen) < 3 or tensor.shape != weight.shape:
            return False
        # at the end of a full_precision block, for instance
        if not self._record.is_still(tensor):
            return False
        # versions do not tell: writes through `.data` change none
        if any(torch.equal(earlier, later) for earlier, later in pairwise(self._seen)):
            return False
        own, other = (each.float().cpu() for each in (self._seen[-1], _sample(weight)))
        distance = (own - other).norm().item()
        # a copy that follows the weight is that weight before the next step
        return 0.0 < distance < 0.5 * other.norm().item() and not _is_trained(tensor)


def _sample(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:_SAMPLE]


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    held = optimizer.__dict__
    steps = held.get(_STEPS, 0) + 1
    # called in every step; and a compiler would compile anew for each count
    if steps > _LAST or torch.compiler.is_compiling():
        return
    held[_STEPS] = steps
    if steps in _SCANS or _CANDIDATES in held:
        _look(optimizer, steps)


@uncompiled
@torch.no_grad()
def _look(optimizer: Optimizer, steps: int) -> None:
    # values are read, which a graph that is being captured cannot
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return
    held = vars(optimizer)
    if steps in _SCANS:
        held[_CANDIDATES] = steps, _candidates(optimizer)
        return
    since, candidates = held[_CANDIDATES]
    if (steps - since) % _INTERVAL:
        return
    for candidate in candidates:
        candidate.look()
    if steps - since < 2 * _INTERVAL:
        return
    del held[_CANDIDATES]
    if any(candidate.is_average() for candidate in candidates):
        # once for each optimizer
        held[_STEPS] = _LAST
        warn(f"somebody averages 16-bit weights of a cast model in a 16-bit tensor, in place, {_WAY_OUT}")


def _candidates(optimizer: Optimizer) -> list[_Candidate]:
    """Return what looks like an average of the largest of an optimizer's 16-bit weights."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    rounded = [param for param in params if _is_rounded(param) and param.requires_grad]
    if not rounded:
        return []
    largest = max(rounded, key=Tensor.numel)
    weight = local(largest)
    if _is_known(largest) or not weight.numel() or next(_scans) > _MOST_SCANS:
        return []
    own = {id(local(tensor)) for param in params for tensor in (param, param.grad) if tensor is not None}
    return [
        _Candidate(tensor, weight)
        for tensor in gc.get_objects()
        # exactly these types: a subclass may be of any kind
        if type(tensor) in _KINDS and id(tensor) not in own and _may_be_average(tensor, weight)
    ]


def _may_be_average(tensor: Tensor, weight: Tensor) -> bool:
    try:
        return (
            tensor.dtype == weight.dtype
            and tensor.shape == weight.shape
            and tensor.layout is torch.strided
            and _has_memory(tensor)
            and tensor.data_ptr() != weight.data_ptr()
        )
    except RuntimeError:
        # what transforms of torch.func work on looks like a tensor, and has no memory
        return False


def _has_memory(tensor: Tensor) -> bool:
    # fully_shard lets go of what it has gathered, and keeps the tensor
    return tensor.untyped_storage().nbytes() > 0


def _is_rounded(param: Tensor) -> bool:
    return param.dtype in SPLIT_DTYPES and storage_of(param).param is not None


def _is_known(weight: Tensor) -> bool:
    said = _said.get(id(weight))
    return said is not None and said() is weight


def _is_trained(tensor: Tensor) -> bool:
    """Return whether an optimizer has a tensor among its parameters."""
    # not isinstance, which asks objects that stand for others what they are
    optimizers = [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]
    groups = chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
    return any(local(param) is tensor for group in groups for param in group["params"])
