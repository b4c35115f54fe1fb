"""Where the operands of a step lie: raw addresses, lengths and group numbers, cut into chunks.

Parameters stay where they are; a table names them, one for each form of storage, for kernels that run over all of
them at once. Gradients lie elsewhere in every step, if they are given back between two. So all else is laid out first
(a `_Layout`), and is filled with the gradients' addresses for each step. For the same layout and addresses as before
that gives the same tables, which may be on a device already; none is ever written to again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch.kernels.operands import Batch, Operand, Rounding
from duotone.torch.kernels.reference import CHUNK

# columns of `Table.parameters`; in `GradTable.chunks` too the first is an address of a gradient
GRAD, WEIGHT, TAIL, MOMENT1, MOMENT2, STEP, BETA_PRODUCTS, NUMEL, NUMBER, GROUP = range(10)

_DTYPE_OF = attrgetter("dtype")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Form(NamedTuple):
    """How the tensors of an operand are stored, and so which kernel reads them.

    Attributes:
        weight: a format's name, with `+tail` or `+stochastic` behind it where that is what updates go into.
        grad: a format's name.
        moments: a format's name, or `none`.
    """

    weight: str
    grad: str
    moments: str


class Table(NamedTuple):
    """All operands of one form.

    Attributes:
        form: theirs.
        parameters: int64 of shape `(n, 10)`: addresses, lengths and numbers, by column. An address is 0 where there
            is no such tensor.
        chunks: int64 of shape `(m, 2)`: a row of `parameters`, and the first of the up to `CHUNK` elements from there.
        lengths: int64 of shape `(m,)`: how many elements a chunk has.
    """

    form: Form
    parameters: np.ndarray
    chunks: np.ndarray
    lengths: np.ndarray


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
    """Return one table for each form among operands, which lie dense and in one layout each."""
    if not isinstance(operands, Batch):
        return _filled(_layout(tuple(map(_row, operands))), _addresses(operand.grad for operand in operands))
    if "layout" not in operands.noted:
        operands.noted["layout"] = _layout(tuple(map(_row, operands)))
    return _filled(operands.noted["layout"], _addresses(operands.grads))


def grad_tables_of(grads: Sequence[Tensor]) -> tuple[GradTable, ...]:
    """Return one table for each dtype among dense gradients."""
    return _filled(_grad_layout(tuple(map(_DTYPE_OF, grads)), tuple(map(Tensor.numel, grads))), _addresses(grads))


def _addresses(grads: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(map(Tensor.data_ptr, grads))


# a few optimizers, each with a few sets of addresses that take turns
@lru_cache(maxsize=32)
def _filled(layout: _Layout[Made], addresses: tuple[int, ...]) -> tuple[Made, ...]:
    found = np.array(addresses, dtype=np.int64)
    tables = []
    for rows, owners, made, distances in layout.parts:
        filled = rows.copy()
        # adding takes NumPy longer than all else here
        filled[:, GRAD] = found[owners] if distances is None else found[owners] + distances
        tables.append(made(filled))
    return tuple(tables)


def _row(operand: Operand) -> tuple[Form, tuple[int, ...]]:
    weight, tail, grad, moments, step, beta_products, rounding, number, group = operand
    count = len(moments)
    form = _form(weight.dtype, tail is not None, rounding, grad.dtype, moments[0].dtype if count else None)
    return form, (
        0,
        weight.data_ptr(),
        0 if tail is None else tail.data_ptr(),
        moments[0].data_ptr() if count > 0 else 0,
        moments[1].data_ptr() if count > 1 else 0,
        step.data_ptr(),
        0 if beta_products is None else beta_products.data_ptr(),
        weight.numel(),
        number,
        group,
    )


@cache
def _form(
    weight: torch.dtype, has_tail: bool, rounding: Rounding, grad: torch.dtype, moments: torch.dtype | None
) -> Form:
    where = ""
    if has_tail:
        where = "+tail"
    elif weight != torch.float32 and rounding == Rounding.STOCHASTIC:
        where = "+stochastic"
    return Form(_NAMES[weight] + where, _NAMES[grad], "none" if moments is None else _NAMES[moments])


@lru_cache(maxsize=32)
def _layout(rows: tuple[tuple[Form, tuple[int, ...]], ...]) -> _Layout[Table]:
    parts = []
    for form in dict.fromkeys(form for form, _ in rows):
        places = [place for place, (other, _) in enumerate(rows) if other == form]
        parameters = np.array([rows[place][1] for place in places], dtype=np.int64)
        owners, starts, lengths = _chunks(parameters[:, NUMEL])
        made = partial(Table, form, chunks=np.stack((owners, starts), axis=1), lengths=lengths)
        parts.append(_Part(parameters, np.array(places), made))
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
