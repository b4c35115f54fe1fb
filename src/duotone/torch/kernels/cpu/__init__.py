"""The fused kernels on CPUs: `reference`'s operations, bit for bit, each over all parameters stored alike at once.

Written in Python and compiled by Numba (`elements`, `checksums`, `coefficients`, `updates`, `averages`, `sums`), kept
as machine code (`machine_code`), run on torch's threads (`threads`). A kernel gets one job: an array of addresses and
numbers.
"""

from array import array
from collections.abc import Sequence
from functools import cache, lru_cache
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from duotone.torch.kernels.cpu.machine_code import Entry, entry_of
from duotone.torch.kernels.cpu.threads import pieces_of, run_on_threads
from duotone.torch.kernels.operands import AverageBatch, Batch, Edits, Operand
from duotone.torch.kernels.table import (
    GRAD,
    Formats,
    Table,
    addresses_of,
    average_tables_of,
    grad_tables_of,
    tables_of,
)
from duotone.torch.kernels.updates.definition import Update


def grad_stats(grads: Sequence[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of the true gradient and `found_inf`; see `reference.grad_stats`."""
    total, found_inf = grad_numbers(grads, inverse_scale.item())
    return (
        torch.full((), total, dtype=torch.float64, device="cpu"),
        torch.full((), found_inf, dtype=torch.bool, device="cpu"),
    )


def grad_numbers(grads: Sequence[Tensor], inverse_scale: float) -> tuple[float, bool]:
    """Return the same in Python numbers: its floats are FP64, and one operation of torch takes longer than many."""
    tables = grad_tables_of(grads)
    count = 0
    for table in tables:
        count += len(table.chunks)
    # without gradients the sum is the one zero that is always there
    sums = array("d", bytes(8 * (1 + count)))
    sums_address, _ = sums.buffer_info()
    for table in tables:
        entry = _squares_entry(table.dtype)
        _run_over_chunks(entry, table.chunks[:, 1], _data_of(table.chunks), sums_address)
    job = array("q", (0, 0, 0, 0, sums_address, count))
    _total_entry()(job.buffer_info()[0])
    total = sums[0] * (inverse_scale * inverse_scale)
    return total, not isfinite(total)


def update(
    definition: Update,
    operands: Sequence[Operand],
    settings: Sequence[Any],
    grad_multiplier: Tensor,
    found_inf: Tensor,
    edits: Edits | None = None,
) -> None:
    """Update in place by one step of an optimizer; see `reference.update`."""
    if found_inf.item():
        return
    multiplier = grad_multiplier.item()
    numbers = []
    for group in settings:
        # the seed may not be a number in FP64, and is read from a table of its own
        numbers += (-multiplier if group.maximize else multiplier, *group[:-1], 0.0)
    settings_table = array("d", numbers)
    # the low 64 bits of a seed are its key
    seed_table = array("Q", [int(group.seed) & 0xFFFF_FFFF_FFFF_FFFF for group in settings])
    of_groups = settings_table.buffer_info()[0], seed_table.buffer_info()[0]
    marks = (0, 0) if edits is None else (edits.seen.data_ptr(), edits.mark)
    for run in _runs(definition, operands):
        run.coefficient_job[:2] = array("q", of_groups)
        run.coefficients_entry(run.coefficient_job_address)
        run.counter[0] = 0
        run.job[-2:] = array("q", marks)
        run_on_threads(run.entry, run.job_address, run.pieces)


class _Run(NamedTuple):
    """What runs over the operands of one table: kernels, their jobs, and whose memory stands in these.

    Attributes:
        grads: the column of the table with the addresses of gradients.
        owners: which operand a row is of.
    """

    entry: Entry
    coefficients_entry: Entry
    job: array
    job_address: int
    coefficient_job: array
    coefficient_job_address: int
    counter: array
    pieces: int
    grads: np.ndarray
    owners: np.ndarray
    memory: tuple[Any, ...]


def _runs(definition: Update, operands: Sequence[Operand]) -> list[_Run]:
    """Return what runs over operands; of a `Batch`, all but where gradients lie is the same as in the step before."""
    if not isinstance(operands, Batch):
        return [_run(definition, table) for table in tables_of(operands)]
    runs = operands.cache.get("runs")
    if runs is None:
        runs = operands.cache["runs"] = [_run(definition, table) for table in tables_of(operands)]
    else:
        addresses = addresses_of(operands.grads)
        for run in runs:
            run.grads[:] = addresses if len(runs) == 1 else addresses[run.owners]
    return runs


def _run(definition: Update, table: Table) -> _Run:
    # compiled before anything is written, so that a compiler's failure leaves everything as it was
    entries = _elements_entry(definition, table.formats), _coefficients_entry(definition)
    # tables are never written to, and this one gets other addresses of gradients
    parameters = table.parameters.copy()
    count, columns = parameters.shape
    coefficients = array("f", bytes(4 * (1 + len(definition.coefficient_names._fields)) * count))
    draws, counter = array("q", bytes(16 * count)), array("q", (0,))
    bounds, bounds_address, pieces = _pieces(table.lengths.tobytes())
    lies = _data_of(parameters), coefficients.buffer_info()[0], draws.buffer_info()[0]
    coefficient_job = array("q", (0, 0, *lies, count, columns))
    job = array(
        "q",
        (
            *(counter.buffer_info()[0], bounds_address, pieces, _data_of(table.chunks)),
            *(lies[0], columns, *lies[1:], 0, 0),
        ),
    )
    return _Run(
        *entries,
        job,
        job.buffer_info()[0],
        coefficient_job,
        coefficient_job.buffer_info()[0],
        counter,
        pieces,
        parameters[:, GRAD],
        table.owners,
        (parameters, coefficients, draws, bounds, table.chunks),
    )


def average(batch: AverageBatch, share: Tensor, skipped: Tensor) -> None:
    """Move averages towards masters; see `reference.average`."""
    if skipped.item():
        return
    shares = array("f", (share.item(),))
    for table in average_tables_of(batch):
        parameters, columns = _data_of(table.parameters), table.parameters.shape[1]
        entry = _average_entry(table.formats)
        share_address, _ = shares.buffer_info()
        _run_over_chunks(entry, table.lengths, _data_of(table.chunks), parameters, columns, share_address)


def _run_over_chunks(entry: Entry, lengths: np.ndarray, *words: int) -> None:
    """Run a kernel over chunks of these lengths on threads, its job being these words behind those of the pieces."""
    _, bounds, count = _pieces(lengths.tobytes())
    counter = array("q", (0,))
    job = array("q", (counter.buffer_info()[0], bounds, count, *words))
    run_on_threads(entry, job.buffer_info()[0], count)


def _data_of(numbers: np.ndarray) -> int:
    # what `numbers.ctypes` tells takes ten times as long
    return numbers.__array_interface__["data"][0]


@lru_cache(maxsize=64)
def _pieces(lengths: bytes) -> tuple[array, int, int]:
    """Return where pieces begin, the address of that, and how many there are."""
    bounds = array("q", pieces_of(np.frombuffer(lengths, dtype=np.int64)).tolist())
    return bounds, bounds.buffer_info()[0], len(bounds) - 1


@cache
def _elements_entry(definition: Update, formats: Formats) -> Entry:
    def make() -> Entry:
        from duotone.torch.kernels.cpu import elements

        return elements.kernel(definition, formats)

    return entry_of("-".join((definition.name, formats.weight, formats.grad, *formats.moments)), make)


@cache
def _coefficients_entry(definition: Update) -> Entry:
    def make() -> Entry:
        from duotone.torch.kernels.cpu import coefficients

        return coefficients.kernel(definition)

    return entry_of(f"{definition.name}-coefficients", make)


@cache
def _average_entry(formats: Formats) -> Entry:
    def make() -> Entry:
        from duotone.torch.kernels.cpu import averages

        return averages.kernel(formats)

    return entry_of(f"average-{formats.weight}", make)


@cache
def _squares_entry(dtype: str) -> Entry:
    def make() -> Entry:
        from duotone.torch.kernels.cpu import sums

        return sums.squares(dtype)

    return entry_of(f"squares-{dtype}", make)


@cache
def _total_entry() -> Entry:
    def make() -> Entry:
        from duotone.torch.kernels.cpu import sums

        return sums.total()

    return entry_of("total", make)
