"""Where the operands of a step lie: raw addresses, lengths and group numbers, cut into chunks.

Parameters stay where they are; a table names them, one for each form of storage, for kernels that run over all of
them at once. It depends on nothing but the addresses and forms it is asked for, so it is made anew just when one of
these changes.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from duotone.errors import OptimizerError
from duotone.torch.kernels.operands import Batch, Operand, Rounding
from duotone.torch.kernels.reference import CHUNK

# columns of `Table.parameters`
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
    """

    form: Form
    parameters: np.ndarray
    chunks: np.ndarray


class GradTable(NamedTuple):
    """All gradients of one dtype.

    Attributes:
        dtype: a format's name.
        chunks: int64 of shape `(m, 3)`: the address of a chunk, its length, and its number among all chunks.
    """

    dtype: str
    chunks: np.ndarray


def tables_of(operands: Sequence[Operand]) -> tuple[Table, ...]:
    """Return one table for each form among operands, which lie dense and in one layout each."""
    noted = operands.noted if isinstance(operands, Batch) else {}
    if "tables" not in noted:
        noted["tables"] = _tables(tuple([_row(operand) for operand in operands]))
    return noted["tables"]


def grad_tables_of(grads: Sequence[Tensor]) -> tuple[GradTable, ...]:
    """Return one table for each dtype among dense gradients."""
    return _grad_tables(
        tuple(map(_DTYPE_OF, grads)), tuple(map(Tensor.data_ptr, grads)), tuple(map(Tensor.numel, grads))
    )


def _row(operand: Operand) -> tuple[Form, tuple[int, ...]]:
    weight, tail, grad, moments, step, beta_products, rounding, number, group = operand
    count = len(moments)
    form = _form(weight.dtype, tail is not None, rounding, grad.dtype, moments[0].dtype if count else None)
    return form, (
        grad.data_ptr(),
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


# a few optimizers, each with one set of addresses, or a few that take turns
@lru_cache(maxsize=32)
def _tables(rows: tuple[tuple[Form, tuple[int, ...]], ...]) -> tuple[Table, ...]:
    tables = []
    for form in dict.fromkeys(form for form, _ in rows):
        parameters = np.array([row for other, row in rows if other == form], dtype=np.int64)
        tables.append(Table(form, parameters, np.stack(_chunks(parameters[:, NUMEL]), axis=1)))
    return tuple(tables)


@lru_cache(maxsize=32)
def _grad_tables(
    dtypes: tuple[torch.dtype, ...], addresses: tuple[int, ...], lengths: tuple[int, ...]
) -> tuple[GradTable, ...]:
    for dtype in dtypes:
        if dtype not in _NAMES:
            raise OptimizerError(f"a gradient is in {dtype}; allowed are float32, bfloat16 and float16")
    names = np.array([_NAMES[dtype] for dtype in dtypes])
    firsts, numels = (np.array(values, dtype=np.int64) for values in (addresses, lengths))
    owners, starts = _chunks(numels)
    tables = []
    for name in dict.fromkeys(names.tolist()):
        (numbers,) = np.nonzero(names[owners] == name)
        owner, start = owners[numbers], starts[numbers]
        first = firsts[owner] + start * getattr(torch, name).itemsize
        length = np.minimum(numels[owner] - start, CHUNK)
        tables.append(GradTable(name, np.stack((first, length, numbers), axis=1)))
    return tuple(tables)


def _chunks(numels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each chunk of tensors of these lengths, which tensor it is of and where in it it begins."""
    counts = -(-numels // CHUNK)
    owners = np.repeat(np.arange(numels.size), counts)
    firsts = np.cumsum(counts) - counts
    return owners, (np.arange(owners.size) - firsts[owners]) * CHUNK
