"""The launches of an operation: what is uploaded, which kernel runs over what."""

# Triton wraps what is passed to a constexpr by itself
# pyright: reportArgumentType=false

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from duotone.torch.kernels.cuda.averages import average_kernel
from duotone.torch.kernels.cuda.coefficients import BLOCK, FIRST_COEFFICIENT, coefficients_kernel
from duotone.torch.kernels.cuda.device import on
from duotone.torch.kernels.cuda.elements import SPANS, tile_of, update_kernel
from duotone.torch.kernels.cuda.settings import device_settings
from duotone.torch.kernels.cuda.sums import squares_kernel, sums_kernel, total_kernel
from duotone.torch.kernels.cuda.upload import Cache, upload
from duotone.torch.kernels.operands import AverageBatch, Edits, Operand
from duotone.torch.kernels.reference import CHUNK
from duotone.torch.kernels.table import (
    GRAD,
    STEP,
    Formats,
    GradTable,
    Table,
    average_tables_of,
    grad_tables_of,
    tables_of,
)
from duotone.torch.kernels.updates.definition import Update

# a fused multiply-add rounds once where the reference rounds twice
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class UpdatePart(NamedTuple):
    """The chunks of parameters that are stored alike: whose addresses are all multiples of 16, or the others."""

    formats: Formats
    aligned: bool
    chunks: Tensor


class UpdateTable(NamedTuple):
    """The tables of an update on the device, and those of the host that they were made from."""

    parameters: Tensor
    parts: tuple[UpdatePart, ...]
    made_from: tuple[Table, ...]


class SumPart(NamedTuple):
    """The chunks of gradients of one format: all at multiples of 16 and of lengths that are multiples of 8, or none."""

    format: str
    wide: bool
    chunks: Tensor


class SumTable(NamedTuple):
    """The tables of `grad_stats` on the device, and those of the host that they were made from."""

    chunk_count: int
    parts: tuple[SumPart, ...]
    made_from: tuple[GradTable, ...]


_update_tables: Cache[tuple[int, torch.device], UpdateTable] = Cache(32)
_sum_tables: Cache[tuple[int, torch.device], SumTable] = Cache(32)


def update(
    definition: Update,
    operands: Sequence[Operand],
    settings: Sequence[Any],
    grad_multiplier: Tensor,
    found_inf: Tensor,
    edits: Edits | None,
) -> None:
    """Compute every parameter's coefficients, then update parameters, those that are stored alike at once."""
    if not operands:
        return
    device = operands[0].weight.device
    with on(device):
        tables = tables_of(operands)
        table = _update_tables.get((id(tables), device), device, lambda: _update_table(tables, device))
        rows, _rates = device_settings(settings, device)
        count = table.parameters.shape[0]
        per_parameter, per_element = constants_of(definition)
        words = FIRST_COEFFICIENT + len(definition.coefficient_names._fields)
        coefficients = torch.empty((count, words), dtype=torch.int32, device=device)
        coefficients_kernel[(-(-count // BLOCK),)](
            table.parameters, rows, coefficients, grad_multiplier, found_inf, count, **per_parameter, **OPTIONS
        )
        # without edits to note, a mark of no bit is set in numbers that are read by now
        seen, mark = (coefficients, 0) if edits is None else edits
        for formats, aligned, chunks in table.parts:
            update_kernel[(chunks.shape[0], SPANS)](
                table.parameters,
                chunks,
                coefficients,
                found_inf,
                seen,
                mark,
                **per_element,
                **constants_in(formats),
                ALIGNED=aligned,
                **OPTIONS,
            )


def average(batch: AverageBatch, share: Tensor, skipped: Tensor) -> None:
    """Move averages towards masters, those of weights that are stored alike at once."""
    if not batch.operands:
        return
    device = share.device
    with on(device):
        tables = average_tables_of(batch)
        table = _update_tables.get((id(tables), device), device, lambda: _update_table(tables, device))
        for formats, aligned, chunks in table.parts:
            average_kernel[(chunks.shape[0], SPANS)](
                table.parameters, chunks, share, skipped, **average_constants_in(formats), ALIGNED=aligned, **OPTIONS
            )


def average_constants_in(formats: Formats) -> dict[str, Any]:
    """Return what the kernel of averages is compiled for because of how weights are stored."""
    constants = constants_in(formats)
    return {name: constants[name] for name in ("WEIGHT", "KIND", "TILE")}


@cache
def constants_of(definition: Update) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the kernels of an update are compiled for: that of its coefficients, and that of its elements."""
    own = import_module(f"duotone.torch.kernels.cuda.updates.{definition.name}")
    # Triton keeps compiled kernels by the text of a constant, and that of a class does not tell its fields
    names = definition.coefficient_names._fields
    per_parameter = {
        "COEFFICIENTS": own.coefficients,
        "SETTINGS": definition.settings,
        "NUMBERS": definition.settings._fields[1:-2],
        "NAMES": names,
        "COUNTERS": definition.counter_count,
        "BLOCK": BLOCK,
    }
    return per_parameter, {"APPLY": own.apply, "COEFFICIENTS": definition.coefficient_names, "NAMES": names}


@cache
def constants_in(formats: Formats) -> dict[str, Any]:
    """Return what the kernel of an update's elements is compiled for because of how they are stored."""
    weight, _, kind = formats.weight.partition("+")
    return {
        "WEIGHT": weight,
        "KIND": kind,
        "GRAD": formats.grad,
        "MOMENTS": formats.moments,
        "TILE": tile_of(formats),
    }


def sum_of_squares(grads: Sequence[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the squares of each chunk, format by format, then the sums."""
    device = inverse_scale.device
    with on(device):
        tables = grad_tables_of(grads)
        table = _sum_tables.get((id(tables), device), device, lambda: _sum_table(tables, device))
        sums = torch.empty(table.chunk_count, dtype=torch.float64, device=device)
        for name, wide, chunks in table.parts:
            squares_kernel[(chunks.shape[0],)](chunks, sums, FORMAT=name, WIDE=wide, **OPTIONS)
        return _total(sums, inverse_scale)


def _total(sums: Tensor, inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sum sums chunk by chunk until one is left; return it for the true gradient, and whether it is not finite."""
    while sums.numel() > CHUNK:
        above = sums
        sums = above.new_empty(-(-above.numel() // CHUNK))
        sums_kernel[(sums.numel(),)](above, above.numel(), sums, **OPTIONS)
    total = sums.new_empty(())
    found_inf = sums.new_empty((), dtype=torch.bool)
    total_kernel[(1,)](sums, sums.numel(), inverse_scale, total, found_inf, **OPTIONS)
    return total, found_inf


def _update_table(tables: tuple[Table, ...], device: torch.device) -> UpdateTable:
    """Upload all parameters as one table, and the chunks of those that are stored alike, aligned ones apart."""
    labels, chunks, above = [], [], 0
    for formats, parameters, pairs, *_ in tables:
        aligned = (parameters[:, GRAD:STEP] % 16 == 0).all(axis=1)[pairs[:, 0]]
        for is_aligned in (True, False):
            chosen = pairs[aligned == is_aligned]
            if chosen.size:
                labels.append((formats, is_aligned))
                chunks.append(chosen + np.array([above, 0]))
        above += parameters.shape[0]
    moved, *parts = upload([np.concatenate([table.parameters for table in tables]), *chunks], device)
    named = [UpdatePart(formats, aligned, part) for (formats, aligned), part in zip(labels, parts, strict=True)]
    return UpdateTable(moved, tuple(named), tables)


def _sum_table(tables: tuple[GradTable, ...], device: torch.device) -> SumTable:
    """Upload the chunks of each dtype, those that allow wide accesses apart."""
    labels, chunks = [], []
    for name, rows in tables:
        wide = (rows[:, 0] % 16 == 0) & (rows[:, 1] % 8 == 0)
        for is_wide in (True, False):
            chosen = rows[wide == is_wide]
            if chosen.size:
                labels.append((name, is_wide))
                chunks.append(chosen)
    moved = upload(chunks, device)
    parts = [SumPart(name, wide, part) for (name, wide), part in zip(labels, moved, strict=True)]
    return SumTable(sum(rows.shape[0] for _, rows in tables), tuple(parts), tables)
