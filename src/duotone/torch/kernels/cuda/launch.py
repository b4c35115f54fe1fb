"""The launches of an operation: what is uploaded, which kernel runs over what."""

# Triton wraps what is passed to a constexpr by itself
# pyright: reportArgumentType=false

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from duotone.torch.kernels.cuda.coefficients import BLOCK, WORDS, coefficients_kernel
from duotone.torch.kernels.cuda.settings import Settings, device_settings
from duotone.torch.kernels.cuda.sums import squares_kernel, sums_kernel, total_kernel
from duotone.torch.kernels.cuda.update import SPANS, tile_of, update_kernel
from duotone.torch.kernels.cuda.upload import Cache, upload
from duotone.torch.kernels.operands import Operand
from duotone.torch.kernels.reference import CHUNK
from duotone.torch.kernels.table import GRAD, MOMENT2, Form, GradTable, Table, grad_tables_of, tables_of

# a fused multiply-add rounds once where the reference rounds twice
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class UpdatePart(NamedTuple):
    """The chunks of one form: of parameters whose addresses are all multiples of 16, or of the others."""

    form: Form
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
    rule: str, operands: Sequence[Operand], settings: Sequence[Settings], grad_multiplier: Tensor, found_inf: Tensor
) -> None:
    """Compute every parameter's coefficients, then update parameters form by form."""
    if not operands:
        return
    device = operands[0].weight.device
    with _on(device):
        tables = tables_of(operands)
        table = _update_tables.get((id(tables), device), device, lambda: _update_table(tables, device))
        rows, _rates = device_settings(settings, device)
        count = table.parameters.shape[0]
        coefficients = torch.empty((count, WORDS), dtype=torch.int32, device=device)
        coefficients_kernel[(-(-count // BLOCK),)](
            table.parameters, rows, coefficients, grad_multiplier, found_inf, count, RULE=rule, BLOCK=BLOCK, **OPTIONS
        )
        for form, aligned, chunks in table.parts:
            weight, _, kind = form.weight.partition("+")
            update_kernel[(chunks.shape[0], SPANS)](
                table.parameters,
                chunks,
                coefficients,
                found_inf,
                RULE=rule,
                WEIGHT=weight,
                KIND=kind,
                GRAD=form.grad,
                MOMENTS=form.moments,
                TILE=tile_of(form),
                ALIGNED=aligned,
                **OPTIONS,
            )


def sum_of_squares(grads: Sequence[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the squares of each chunk, format by format, then the sums."""
    device = inverse_scale.device
    with _on(device):
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
    """Upload the parameters of all forms as one table, and the chunks of each form, aligned ones apart."""
    labels, chunks, above = [], [], 0
    for form, parameters, pairs, _ in tables:
        aligned = (parameters[:, GRAD : MOMENT2 + 1] % 16 == 0).all(axis=1)[pairs[:, 0]]
        for is_aligned in (True, False):
            chosen = pairs[aligned == is_aligned]
            if chosen.size:
                labels.append((form, is_aligned))
                chunks.append(chosen + np.array([above, 0]))
        above += parameters.shape[0]
    moved, *parts = upload([np.concatenate([table.parameters for table in tables]), *chunks], device)
    named = [UpdatePart(form, aligned, part) for (form, aligned), part in zip(labels, parts, strict=True)]
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


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Have Triton launch on a device that is not the current one."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)
