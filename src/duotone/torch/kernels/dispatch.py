"""Which backend runs an operation: the fused one of the device, or the one that was asked for by name.

A fused backend is tried once on a gradient of one element. Where it does not work (no compiler, no Numba, no Triton),
that is said once and the reference runs, which gives the same bits; a backend that was asked for by name raises.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from duotone.call_site import warn
from duotone.errors import BackendError, nearest_names
from duotone.torch.internals.autograd import increment_version
from duotone.torch.kernels import reference
from duotone.torch.kernels.gradients import batch_of
from duotone.torch.kernels.layout import dense, in_one_layout, is_in_one_layout
from duotone.torch.kernels.operands import AverageBatch, Batch, Edits, Operand
from duotone.torch.kernels.uncompiled import uncompiled
from duotone.torch.kernels.updates.definition import Update

Backend = Literal["auto", "reference", "cpu", "cuda"]
BACKENDS: tuple[str, ...] = get_args(Backend)
_HOST = torch.device("cpu")


@uncompiled
def grad_stats(grads: Sequence[Tensor], inverse_scale: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Return the sum of squares of the true gradient and `found_inf`, as `reference.grad_stats` does.

    Args:
        grads: as there, in any memory layout.
        inverse_scale: as there.
        backend: whose kernel; as in `update`.
    """
    module = _module(inverse_scale.device, backend)
    return module.grad_stats(_dense(grads), inverse_scale)


@uncompiled
def grad_numbers(grads: Sequence[Tensor], inverse_scale: float, backend: Backend = "auto") -> tuple[float, bool]:
    """Return what `grad_stats` does in Python numbers, for gradients on a CPU."""
    module = _module(_HOST, backend)
    if module is not reference:
        return module.grad_numbers(_dense(grads), inverse_scale)
    scale = torch.full((), inverse_scale, dtype=torch.float32, device=_HOST)
    total, found_inf = reference.grad_stats(_dense(grads), scale)
    return float(total), bool(found_inf)


def update(
    definition: Update,
    operands: Sequence[Operand],
    settings: Sequence[Any],
    grad_multiplier: Tensor,
    found_inf: Tensor,
    backend: Backend = "auto",
    edits: Edits | None = None,
) -> None:
    """Update in place by one step of an optimizer, as `reference.update` does, operands in any memory layout.

    Args:
        definition: as there.
        operands: as there, all on one device; may be empty.
        settings: as there.
        grad_multiplier: as there.
        found_inf: as there.
        backend: `"auto"` for the device's own, or one by name.
        edits: as there.

    Raises:
        BackendError: the backend was asked for by name and does not work here, or not on this device.
    """
    weights = _weights(operands)
    if not weights:
        return
    module = _module(weights[0].device, backend)
    dense_operands, write_back = in_one_layout(operands)
    if module is reference or write_back:
        # torch would keep what its own operations on a gradient with a graph have read
        with torch.no_grad():
            module.update(definition, dense_operands, settings, grad_multiplier, found_inf, edits)
            for copy_back in write_back:
                copy_back()
    else:
        module.update(definition, dense_operands, settings, grad_multiplier, found_inf, edits)
    # autograd must notice what was written through raw addresses
    increment_version(weights)


def average(batch: AverageBatch, share: Tensor, skipped: Tensor, backend: Backend = "auto") -> None:
    """Move averages towards masters, as `reference.average` does, operands in any memory layout.

    Args:
        batch: as there, all on one device; may be empty.
        share: as there.
        skipped: as there.
        backend: whose kernel; as in `update`.
    """
    if not batch.operands:
        return
    module = _module(share.device, backend)
    if module is reference:
        module.average(batch, share, skipped)
        return
    if "dense" not in batch.cache:
        dense_ones = tuple(filter(is_in_one_layout, batch.operands))
        others = tuple([operand for operand in batch.operands if not is_in_one_layout(operand)])
        batch.cache["dense"] = AverageBatch(dense_ones, {}), AverageBatch(others, {})
    dense_batch, others_batch = batch.cache["dense"]
    module.average(dense_batch, share, skipped)
    # no random bits and no sums, so that any order of elements gives the same bits
    reference.average(others_batch, share, skipped)
    increment_version([operand.average for operand in dense_batch.operands])


def check_backend(name: str, devices: Iterable[torch.device] = ()) -> None:
    """Raise unless a backend of this name exists, and try it on the GPUs among some devices.

    Trying waits for the device, which a step, captured in a CUDA graph perhaps, must not do.

    Raises:
        BackendError: there is none, or it does not work although it was asked for.
    """
    if name not in BACKENDS:
        raise BackendError(f'there is no backend "{name}"; {nearest_names(name, BACKENDS)}')
    for device in set(devices):
        if device.type == "cuda":
            _module(device, name)  # type: ignore[arg-type]


def has_fused_kernels(device: torch.device) -> bool:
    """Return whether the device's own kernels work, which is tried once; where they do not, that is said then.

    >>> has_fused_kernels(torch.device("meta"))
    False
    """
    return device.type in BACKENDS and isinstance(_tried(device.type), ModuleType)


def _dense(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    batch = batch_of(grads)
    return batch if batch.kind.are_contiguous else [dense(grad) for grad in batch]


def _weights(operands: Sequence[Operand]) -> list[Tensor]:
    cache = operands.cache if isinstance(operands, Batch) else {}
    if "weights" not in cache:
        cache["weights"] = [operand.weight for operand in operands]
    return cache["weights"]


def _module(device: torch.device, backend: Backend) -> ModuleType:
    own = device.type if device.type in BACKENDS else "reference"
    if backend not in ("auto", "reference", own):
        raise BackendError(f'backend "{backend}" was asked for, but the tensors are on {device}; use backend "{own}"')
    if backend == "reference" or own == "reference":
        return reference
    fused = _tried(own)
    if isinstance(fused, ModuleType):
        return fused
    if backend == own:
        raise BackendError(f'backend "{own}" does not work here: {fused}; mend that, or use backend "reference"')
    return reference


@cache
def _tried(name: str) -> ModuleType | str:
    """Try a fused backend; return it, or what is wrong with it, said once."""
    try:
        module = import_module(f"duotone.torch.kernels.{name}")
        total, found_inf = module.grad_stats([torch.full((1,), 3.0, device=name)], torch.ones((), device=name))
        if (total.item(), found_inf.item()) == (9.0, False):
            return module
        problem = f"the square of 3 came out as {total.item()}"
    except Exception as error:  # whatever a compiler that is missing or broken may raise
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    warn(
        f'the fused "{name}" kernels do not work here ({problem}); the plain torch ones run instead, with the same '
        "results, slower",
    )
    return problem
