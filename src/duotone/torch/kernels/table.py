"""Where the operands of a step lie: raw addresses, lengths and group numbers, cut into chunks.

Parameters stay where they are; a table names them, one for each combination of formats, for kernels that run over all
of them at once. Gradients lie elsewhere in every step, if they are given back between two. So all else is laid out
first (a `_Layout`), and is filled with the gradients' addresses for each step. For the same layout and addresses as
before that gives the same tables, which may be on a device already; none is ever written to again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch.kernels.gradients import batch_of
from duotone.torch.kernels.operands import AverageBatch, AverageOperand, Batch, Operand, Rounding
from duotone.torch.kernels.reference import CHUNK
from duotone.torch.kernels.slots import MAX_MOMENTS

# columns of `Table.parameters`; in `GradTable.chunks` too the first is an address of a gradient
GRAD, WEIGHT, TAIL = range(3)
# one after the other, as many as there may be
MOMENT = 3
STEP, COUNTERS, NUMEL, NUMBER, GROUP, CHECKSUMS = range(MOMENT + MAX_MOMENTS, MOMENT + MAX_MOMENTS + 6)
COLUMNS = CHECKSUMS + 1

_NO_MOMENTS = (0,) * MAX_MOMENTS
_DTYPE_OF = attrgetter("dtype")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Formats(NamedTuple):
    """How the tensors of an operand are stored, and so which kernel reads them.

    Attributes:
        weight: a format's name, with `+tail` or `+stochastic` behind it where that is what updates go into.
        grad: a format's name.
        moments: the format's name of each.
    """

    weight: str
    grad: str
    moments: tuple[str, ...]


class Table(NamedTuple):
    """All operands that are stored alike.

    Attributes:
        formats: theirs.
        parameters: int64 of shape `(n, COLUMNS)`: addresses, lengths and numbers, by column. An address is 0 where
            there is no such tensor.
        chunks: int64 of shape `(m, 2)`: a row of `parameters`, and the first of the up to `CHUNK` elements from there.
        lengths: int64 of shape `(m,)`: how many elements a chunk has.
        owners: int64 of shape `(n,)`: which of the operands a row of `parameters` is of.
    """

    formats: Formats
    parameters: np.ndarray
    chunks: np.ndarray
    lengths: np.ndarray
    owners: np.ndarray


class GradTable(NamedTuple):
    """All gradients of one dtype.

    Attributes:
        dtype: a format's name.
        chunks: int64 of shape `(m, 3)`: the address of a chunk, its length, and its number among all chunks.
    """

    dtype: str
    chunks: np.ndarray


Made = TypeVar("Made", Table, GradTable)


class _Part(NamedTuple, Generic[Made]):
    """One table but for where gradients lie.

    Attributes:
        rows: what is to hold an address in each row.
        owners: whose gradient a row is of.
        made: returns the table, given its rows.
        distances: how many bytes behind the beginning of the gradient; None if all are 0.
    """

    rows: np.ndarray
    owners: np.ndarray
    made: Callable[[np.ndarray], Made]
    distances: np.ndarray | None = None


# compared by identity, which spares a look at its content
@dataclass(frozen=True, eq=False)
class _Layout(Generic[Made]):
    """The tables of some operands or gradients, wherever the gradients lie."""

    parts: tuple[_Part[Made], ...]


def tables_of(operands: Sequence[Operand]) -> tuple[Table, ...]:
    """Return one table for each combination of formats of operands, which lie dense and in one layout each."""
    if not isinstance(operands, Batch):
        grads = [operand.grad for operand in operands]
        return _filled(_layout(tuple(map(_row, operands))), addresses_of(grads).tobytes())
    if "layout" not in operands.cache:
        operands.cache["layout"] = _layout(tuple(map(_row, operands)))
    return _filled(operands.cache["layout"], addresses_of(operands.grads).tobytes())


def average_tables_of(batch: AverageBatch) -> tuple[Table, ...]:
    """Return one table for each format of weights; an average stands where an update has its first moment."""
    if "tables" not in batch.cache:
        rows = tuple(map(_average_row, batch.operands))
        batch.cache["tables"] = _filled(_layout(rows), bytes(8 * len(rows)))
    return batch.cache["tables"]


def grad_tables_of(grads: Sequence[Tensor]) -> tuple[GradTable, ...]:
    """Return one table for each dtype among dense gradients."""
    batch = batch_of(grads)
    cache = batch.kind.cache
    if "layout" not in cache:
        cache["layout"] = _grad_layout(tuple(map(_DTYPE_OF, batch)), tuple(map(Tensor.numel, batch)))
    return _filled(cache["layout"], addresses_of(batch).tobytes())


def addresses_of(tensors: Sequence[Tensor]) -> np.ndarray:
    """Return where tensors lie, int64."""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


# a few optimizers, each with a few sets of addresses that take turns
@lru_cache(maxsize=32)
def _filled(layout: _Layout[Made], addresses: bytes) -> tuple[Made, ...]:
    # of thousands of numbers, bytes are hashed in a tenth of a tuple's time
    of_grads = np.frombuffer(addresses, np.int64)
    tables = []
    for rows, owners, made, distances in layout.parts:
        filled = rows.copy()
        # adding takes NumPy longer than all else here
        filled[:, GRAD] = of_grads[owners] if distances is None else of_grads[owners] + distances
        tables.append(made(filled))
    return tuple(tables)


def _row(operand: Operand) -> tuple[Formats, tuple[int, ...]]:
    weight, tail, grad, moments, step, counters, rounding, number, group, checksums = operand
    formats = _formats(weight.dtype, tail is not None, rounding, grad.dtype, tuple(map(_DTYPE_OF, moments)))
    return formats, (
        0,
        weight.data_ptr(),
        0 if tail is None else tail.data_ptr(),
        *map(Tensor.data_ptr, moments),
        *_NO_MOMENTS[len(moments) :],
        step.data_ptr(),
        0 if counters is None else counters.data_ptr(),
        weight.numel(),
        number,
        group,
        0 if checksums is None else checksums.data_ptr(),
    )


def _average_row(operand: AverageOperand) -> tuple[Formats, tuple[int, ...]]:
    weight, tail, average = operand
    formats = _formats(weight.dtype, tail is not None, Rounding.NEAREST, average.dtype, (average.dtype,))
    addresses = 0, weight.data_ptr(), 0 if tail is None else tail.data_ptr(), average.data_ptr()
    # neither other moments nor step, counters, number, group and checksums
    return formats, (*addresses, *_NO_MOMENTS[1:], 0, 0, weight.numel(), 0, 0, 0)


@cache
def _formats(
    weight: torch.dtype, has_tail: bool, rounding: Rounding, grad: torch.dtype, moments: tuple[torch.dtype, ...]
) -> Formats:
    where = ""
    if has_tail:
        where = "+tail"
    elif weight != torch.float32 and rounding == Rounding.STOCHASTIC:
        where = "+stochastic"
    return Formats(_NAMES[weight] + where, _NAMES[grad], tuple([_NAMES[moment] for moment in moments]))


@lru_cache(maxsize=32)
def _layout(rows: tuple[tuple[Formats, tuple[int, ...]], ...]) -> _Layout[Table]:
    parts = []
    for formats in dict.fromkeys(formats for formats, _ in rows):
        indices = [index for index, (other, _) in enumerate(rows) if other == formats]
        parameters = np.array([rows[index][1] for index in indices], dtype=np.int64)
        owners, starts, lengths = _chunks(parameters[:, NUMEL])
        made = partial(
            Table, formats, chunks=np.stack((owners, starts), axis=1), lengths=lengths, owners=np.array(indices)
        )
        parts.append(_Part(parameters, np.array(indices), made))
    return _Layout(tuple(parts))


@lru_cache(maxsize=32)
def _grad_layout(dtypes: tuple[torch.dtype, ...], numels: tuple[int, ...]) -> _Layout[GradTable]:
    for dtype in dtypes:
        if dtype not in _NAMES:
            raise OptimizerError(f"a gradient is in {dtype}; allowed are float32, bfloat16 and float16")
    names = np.array([_NAMES[dtype] for dtype in dtypes])
    owners, starts, lengths = _chunks(np.array(numels, dtype=np.int64))
    parts = []
    for name in dict.fromkeys(names.tolist()):
        (numbers,) = np.nonzero(names[owners] == name)
        distances = starts[numbers] * getattr(torch, name).itemsize
        rows = np.stack((distances, lengths[numbers], numbers), axis=1)
        made = partial(GradTable, name)
        parts.append(_Part(rows, owners[numbers], made, distances if distances.any() else None))
    return _Layout(tuple(parts))


def _chunks(numels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each chunk of tensors of these lengths, which tensor it is of, where in it it begins, its length."""
    counts = -(-numels // CHUNK)
    owners = np.repeat(np.arange(numels.size), counts)
    firsts = np.cumsum(counts) - counts
    starts = (np.arange(owners.size) - firsts[owners]) * CHUNK
    return owners, starts, np.minimum(numels[owners] - starts, CHUNK)
