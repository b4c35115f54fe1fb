"""The fused kernels on CPUs: `reference`'s operations, bit for bit, each over all parameters stored alike at once.

Written in Python and compiled by Numba (`elements`, `checksums`, `coefficients`, `updates`, `averages`, `sums`), kept
as machine code (`machine_code`), run on torch's threads (`threads`). A kernel gets one job: an array of addresses and
numbers.
"""

from array import array
from collections.abc import Sequence
from functools import cache, lru_cache
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duotone.torch.kernels.cpu.machine_code import Entry, entry_of
from duotone.torch.kernels.cpu.threads import pieces_of, run_on_threads
from duotone.torch.kernels.operands import AverageBatch, Edits, Operand
from duotone.torch.kernels.table import Formats, average_tables_of, grad_tables_of, tables_of
from duotone.torch.kernels.updates.definition import Update


def grad_stats(grads: Sequence[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of the true gradient and `found_inf`; see `reference.grad_stats`."""
    tables = grad_tables_of(grads)
    count = sum(len(table.chunks) for table in tables)
    # without gradients the sum is the one zero that is always there
    sums = array("d", bytes(8 * (1 + count)))
    sums_address = _address(sums)
    for table in tables:
        lengths = table.chunks[:, 1]
        _run_over_chunks(_squares_entry(table.dtype), lengths, table.chunks.ctypes.data, sums_address)
    job = array("q", (0, 0, 0, 0, sums_address, count))
    _total_entry()(_address(job))
    # Python's floats are FP64, and one operation of torch takes longer than these
    inverse = inverse_scale.item()
    total = sums[0] * (inverse * inverse)
    return (
        torch.full((), total, dtype=torch.float64, device="cpu"),
        torch.full((), not isfinite(total), dtype=torch.bool, device="cpu"),
    )


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
    settings_table = array("d")
    for group in settings:
        settings_table.append(-multiplier if group.maximize else multiplier)
        # the seed may not be a number in FP64, and is read from a table of its own
        settings_table.extend((*map(float, group[:-1]), 0.0))
    # the low 64 bits of a seed are its key
    seed_table = array("Q", [int(group.seed) & 0xFFFF_FFFF_FFFF_FFFF for group in settings])
    of_groups = _address(settings_table), _address(seed_table)
    marks = (0, 0) if edits is None else (edits.seen.data_ptr(), edits.mark)
    for table in tables_of(operands):
        # compiled before anything is written, so that a compiler's failure leaves everything as it was
        elements = _elements_entry(definition, table.formats)
        count, columns = table.parameters.shape
        parameters = table.parameters.ctypes.data
        coefficients = array("f", bytes(4 * (1 + len(definition.coefficient_names._fields)) * count))
        draws = array("q", bytes(16 * count))
        rows = _address(coefficients), _address(draws)
        job = array("q", (*of_groups, parameters, *rows, count, columns))
        _coefficients_entry(definition)(_address(job))
        _run_over_chunks(elements, table.lengths, table.chunks.ctypes.data, parameters, columns, *rows, *marks)


def average(batch: AverageBatch, share: Tensor, skipped: Tensor) -> None:
    """Move averages towards masters; see `reference.average`."""
    if skipped.item():
        return
    shares = array("f", (share.item(),))
    for table in average_tables_of(batch):
        parameters, columns = table.parameters.ctypes.data, table.parameters.shape[1]
        entry = _average_entry(table.formats)
        _run_over_chunks(entry, table.lengths, table.chunks.ctypes.data, parameters, columns, _address(shares))


def _run_over_chunks(entry: Entry, lengths: np.ndarray, *words: int) -> None:
    """Run a kernel over chunks of these lengths on threads, its job being these words behind those of the pieces."""
    _, bounds, count = _pieces(lengths.tobytes())
    counter = array("q", (0,))
    job = array("q", (_address(counter), bounds, count, *words))
    run_on_threads(entry, _address(job), count)


def _address(numbers: array) -> int:
    # an array of NumPy's takes ten times as long to tell
    return numbers.buffer_info()[0]


@lru_cache(maxsize=64)
def _pieces(lengths: bytes) -> tuple[array, int, int]:
    """Return where pieces begin, the address of that, and how many there are."""
    bounds = array("q", pieces_of(np.frombuffer(lengths, dtype=np.int64)).tolist())
    return bounds, _address(bounds), len(bounds) - 1


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
