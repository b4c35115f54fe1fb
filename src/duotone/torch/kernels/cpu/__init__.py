"""The fused kernels on CPUs: `reference`'s operations, bit for bit, each over all parameters of one form at once.

Written in Python and compiled by Numba (`update`, `coefficients`, `sums`), kept as machine code (`machine_code`), run
on torch's threads (`threads`). A kernel gets one job: an array of addresses and numbers.
"""

from array import array
from collections.abc import Sequence
from functools import cache, lru_cache
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from duotone.torch.kernels.cpu.machine_code import Entry, entry_of
from duotone.torch.kernels.cpu.threads import pieces_of, run_on_threads
from duotone.torch.kernels.operands import AdamWSettings, LionSettings, Operand, SGDSettings
from duotone.torch.kernels.table import Form, grad_tables_of, tables_of

# columns of a table of coefficients, as in the module of that name, which must not be imported without need
COEFFICIENTS = 8


def grad_stats(grads: Sequence[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of the true gradient and `found_inf`; see `reference.grad_stats`."""
    tables = grad_tables_of(grads)
    count = sum(len(table.chunks) for table in tables)
    # without gradients the sum is the one zero that is always there
    sums = array("d", bytes(8 * (1 + count)))
    for table in tables:
        lengths = table.chunks[:, 1]
        _run_over_chunks(_squares_entry(table.dtype), lengths, table.chunks.ctypes.data, _address(sums))
    job = array("q", (0, 0, 0, 0, _address(sums), count))
    _total_entry()(_address(job))
    # Python's floats are FP64, and one operation of torch takes longer than these
    inverse = inverse_scale.item()
    total = sums[0] * (inverse * inverse)
    return (
        torch.full((), total, dtype=torch.float64, device="cpu"),
        torch.full((), not isfinite(total), dtype=torch.bool, device="cpu"),
    )


def adamw(
    operands: Sequence[Operand], settings: Sequence[AdamWSettings], grad_multiplier: Tensor, found_inf: Tensor
) -> None:
    """Update in place by one step of AdamW; see `reference.adamw`."""
    rows = [
        (group.maximize, group.lr, group.beta1, group.beta2, group.eps, group.weight_decay, 0.0, 0.0)
        for group in settings
    ]
    _update("adamw", operands, rows, [group.seed for group in settings], grad_multiplier, found_inf)


def sgd(
    operands: Sequence[Operand], settings: Sequence[SGDSettings], grad_multiplier: Tensor, found_inf: Tensor
) -> None:
    """Update in place by one step of SGD; see `reference.sgd`."""
    rows = [
        (group.maximize, group.lr, group.momentum, group.dampening, group.weight_decay, group.nesterov, 0.0, 0.0)
        for group in settings
    ]
    _update("sgd", operands, rows, [group.seed for group in settings], grad_multiplier, found_inf)


def lion(
    operands: Sequence[Operand], settings: Sequence[LionSettings], grad_multiplier: Tensor, found_inf: Tensor
) -> None:
    """Update in place by one step of Lion; see `reference.lion`."""
    rows = [
        (group.maximize, group.lr, group.beta1, group.beta2, group.weight_decay, 0.0, 0.0, 0.0) for group in settings
    ]
    _update("lion", operands, rows, [group.seed for group in settings], grad_multiplier, found_inf)


def _update(
    optimizer: str,
    operands: Sequence[Operand],
    settings: Sequence[tuple[float | Tensor, ...]],
    seeds: Sequence[int],
    grad_multiplier: Tensor,
    found_inf: Tensor,
) -> None:
    """Run an optimizer's two kernels, its rows of settings beginning with `maximize`."""
    if found_inf.item():
        return
    multiplier = grad_multiplier.item()
    settings_table = array("d")
    for maximize, *numbers in settings:
        settings_table.extend((-multiplier if maximize else multiplier, *map(float, numbers)))
    # the low 64 bits of a seed are its key
    seed_table = array("Q", [int(seed) & 0xFFFF_FFFF_FFFF_FFFF for seed in seeds])
    for table in tables_of(operands):
        # compiled before anything is written, so that a compiler's failure leaves everything as it was
        update = _update_entry(optimizer, table.form)
        count, columns = table.parameters.shape
        parameters = table.parameters.ctypes.data
        coefficients = array("f", bytes(4 * COEFFICIENTS * count))
        draws = array("q", bytes(16 * count))
        rows = _address(coefficients), _address(draws)
        job = array("q", (_address(settings_table), _address(seed_table), parameters, *rows, count, columns))
        _coefficients_entry(optimizer)(_address(job))
        _run_over_chunks(update, table.lengths, table.chunks.ctypes.data, parameters, *rows, columns)


def _run_over_chunks(entry: Entry, lengths: np.ndarray, *words: int) -> None:
    """Run a kernel over chunks of these lengths on threads, its job being these words behind those of the pieces."""
    bounds, count = _pieces(lengths.tobytes())
    counter = array("q", (0,))
    job = array("q", (_address(counter), _address(bounds), count, *words))
    run_on_threads(entry, _address(job), count)


def _address(numbers: array) -> int:
    # an array of NumPy's takes ten times as long to tell
    return numbers.buffer_info()[0]


@lru_cache(maxsize=64)
def _pieces(lengths: bytes) -> tuple[array, int]:
    bounds = array("q", pieces_of(np.frombuffer(lengths, dtype=np.int64)).tolist())
    return bounds, len(bounds) - 1


@cache
def _update_entry(optimizer: str, form: Form) -> Entry:
    def make() -> Entry:
        from duotone.torch.kernels.cpu import update

        return update.kernel(optimizer, form)

    return entry_of("-".join((optimizer, *form)), make)


@cache
def _coefficients_entry(optimizer: str) -> Entry:
    def make() -> Entry:
        from duotone.torch.kernels.cpu import coefficients

        return coefficients.kernel(optimizer)

    return entry_of(f"{optimizer}-coefficients", make)


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
