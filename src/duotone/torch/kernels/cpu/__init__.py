"""The fused kernels on CPUs: `reference`'s operations, bit for bit, each over all parameters of one form at once.

Written in Python and compiled by Numba (`update`, `coefficients`, `sums`), kept as machine code (`machine_code`), run
on torch's threads (`threads`). A kernel gets one job: an array of addresses and numbers.
"""

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from duotone.torch.kernels.cpu.machine_code import Entry, entry_of
from duotone.torch.kernels.cpu.threads import pieces_of, run_on_threads
from duotone.torch.kernels.operands import AdamWSettings, LionSettings, Operand, SGDSettings
from duotone.torch.kernels.reference import CHUNK
from duotone.torch.kernels.table import NUMEL, Form, Table, grad_tables_of, tables_of


def grad_stats(grads: Sequence[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of the true gradient and `found_inf`; see `reference.grad_stats`."""
    tables = grad_tables_of(grads)
    sums = np.zeros(1 + sum(len(table.chunks) for table in tables))
    for table in tables:
        pieces = _pieces(table.chunks[:, 1].tobytes())
        counter = np.zeros(1, dtype=np.int64)
        job = _job(counter, pieces, len(pieces) - 1, table.chunks, sums)
        run_on_threads(_squares_entry(table.dtype), job.ctypes.data, len(pieces) - 1)
    # without gradients the sum is the one zero that is always there
    job = _job(0, 0, 0, 0, sums, sums.size - 1)
    _total_entry()(job.ctypes.data)
    total = torch.tensor(sums[0], dtype=torch.float64, device="cpu")
    return total * inverse_scale.double().square(), ~total.isfinite()


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
    settings_table = np.array([[float(value) for value in row] for row in settings])
    settings_table[:, 0] = np.where(settings_table[:, 0] != 0.0, -multiplier, multiplier)
    # the low 64 bits of a seed are its key
    seed_table = np.array([int(seed) & 0xFFFF_FFFF_FFFF_FFFF for seed in seeds], dtype=np.uint64)
    for table in tables_of(operands):
        # compiled before anything is written, so that a compiler's failure leaves everything as it was
        update = _update_entry(optimizer, table.form)
        parameters = table.parameters
        count, columns = parameters.shape
        coefficients = np.empty((count, 8), dtype=np.float32)
        draws = np.empty((count, 2), dtype=np.int64)
        job = _job(settings_table, seed_table, parameters, coefficients, draws, count, columns)
        _coefficients_entry(optimizer)(job.ctypes.data)
        counter, pieces = np.zeros(1, dtype=np.int64), _update_pieces(table)
        job = _job(counter, pieces, len(pieces) - 1, table.chunks, parameters, coefficients, draws, columns)
        run_on_threads(update, job.ctypes.data, len(pieces) - 1)


def _job(*words: int | np.ndarray) -> np.ndarray:
    """Return a kernel's job: numbers as they are, arrays by their address."""
    return np.array([word if isinstance(word, int) else word.ctypes.data for word in words], dtype=np.int64)


def _update_pieces(table: Table) -> np.ndarray:
    rows, starts = table.chunks[:, 0], table.chunks[:, 1]
    return _pieces(np.minimum(table.parameters[rows, NUMEL] - starts, CHUNK).tobytes())


@lru_cache(maxsize=64)
def _pieces(lengths: bytes) -> np.ndarray:
    return pieces_of(np.frombuffer(lengths, dtype=np.int64))


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
