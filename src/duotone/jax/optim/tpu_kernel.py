"""The update of 16-bit weights in one pass and in place on a TPU: a Pallas kernel of whatever equations a part has.

    for each block: read (weight, tail, moments, gradient), compute the part's equations, write (weight, tail, moments)

XLA's compiler for TPUs does not make one kernel of results of 16 and of 32 bits. Of AdamW's update of BF16 weights it
makes four, which read what they share again and again: 54 bytes for each parameter where 26 do, and an array of 2 bytes
besides. Here a block lies in the TPU's vector memory while all of it is computed.

FP16, which Pallas cannot read on TPUs, small arrays, and equations that are not known to compile stay with XLA.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from duotone.jax.optim.elementwise import Part

# of a block; all arrays' blocks, twice, are 7 MiB of the 16 that a kernel may take
_ELEMENTS = 1 << 17
# of a part; XLA has smaller ones in vector memory as a whole
_LEAST = 1 << 17
_COLUMNS = 1024
# a row of tiles of 16-bit numbers, and the columns of every tile
_TILE = (16, 128)
_DTYPES = frozenset(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.int32, jnp.int16)))
# what compiles, with every version of JAX that tests run on; copy and sign do not
_NAMES = """
    abs add and bitcast_convert_type broadcast_in_dim clamp convert_element_type div eq exp ge gt integer_pow is_finite
    le log log1p logistic lt max min mul ne neg not or rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sqrt square sub tanh xor
"""
KNOWN = frozenset(_NAMES.split())


def is_suited(part: Part) -> bool:
    """Return whether a part's results can be computed by a kernel, and are worth one."""
    arrays = [variable.aval for variable in (*part.arrays, *part.variables)]
    inner = [variable.aval for equation in part.equations for variable in equation.outvars]
    return (
        part.size >= _LEAST
        and _rows_and_columns(part.shape) is not None
        and all(array.dtype in _DTYPES for array in arrays)
        and all(array.dtype in _DTYPES or array.dtype == jnp.bool_ for array in inner)
        and all(scalar.aval.dtype in _DTYPES or scalar.aval.dtype == jnp.bool_ for scalar in part.scalars)
        and all(equation.primitive.name in KNOWN for equation in part.equations)
    )


def update(
    part: Part, olds: Sequence[Any], values: Mapping[Any, jax.Array], *, interpret: bool = False
) -> dict[int, jax.Array]:
    """Return a part's results by their places in the program, each in the place of an operand.

    Args:
        part: one that is suited.
        olds: for each result, the variable whose place it takes.
        values: of the part's arrays and scalars, and of `olds`.
        interpret: whether the kernel is not compiled for a TPU but carried out as JAX operations.
    """
    # half a second, and for TPUs alone
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    shape = _rows_and_columns(part.shape)
    if shape is None:
        raise ValueError(f"a kernel for arrays of shape {part.shape}, which `is_suited` refuses")
    read = [*olds, *(variable for variable in part.arrays if variable not in set(olds))]
    is_true = [variable.aval.dtype == jnp.bool_ for variable in part.scalars]

    def body(*references: Any) -> None:
        numbers = references[: len(is_true)]
        sources = references[len(is_true) : len(is_true) + len(read)]
        targets = references[len(is_true) + len(read) :]
        scalars = {
            variable: number[0, 0] != 0 if truth else number[0, 0]
            for variable, number, truth in zip(part.scalars, numbers, is_true, strict=True)
        }
        pieces = {variable: source[...] for variable, source in zip(read, sources, strict=True)}
        for target, new in zip(targets, part.compute(pieces, scalars), strict=True):
            target[...] = new

    block = _block(shape)
    blocks = pl.BlockSpec(block, lambda row, column: (row, column))
    new = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(shape, variable.aval.dtype) for variable in part.variables],
        grid=tuple(-(-size // length) for size, length in zip(shape, block, strict=True)),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(is_true) + [blocks] * len(read),
        out_specs=[blocks] * len(part.variables),
        input_output_aliases={len(is_true) + place: place for place in range(len(olds))},
        interpret=interpret,
        name="duotone_update",
    )(
        *(
            values[variable].astype(jnp.int32 if truth else variable.aval.dtype).reshape(1, 1)
            for variable, truth in zip(part.scalars, is_true, strict=True)
        ),
        *(values[variable].reshape(shape) for variable in read),
    )
    return {place: array.reshape(part.shape) for place, array in zip(part.results, new, strict=True)}


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return a shape of two dimensions whose tiles are the same ones in the same places, or None."""
    # XLA may turn an array whose rows do not fill their tiles, and would turn it back for the kernel
    if len(shape) < 2 or shape[-1] % _TILE[1] or (len(shape) > 2 and shape[-2] % _TILE[0]):
        return None
    rows = math.prod(shape[:-1])
    return (rows, shape[-1]) if rows >= _TILE[0] else None


def _block(shape: tuple[int, int]) -> tuple[int, int]:
    columns = min(shape[1], _COLUMNS)
    rows = _ELEMENTS // columns // _TILE[0] * _TILE[0]
    return min(rows, shape[0]), columns
