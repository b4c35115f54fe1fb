"""What an update computes once per parameter: FP32 coefficients from FP64 arithmetic, and the words of random bits.

One launch over all parameters, before the update itself. It reads step counts and counters, hands on what they were,
and advances them unless `found_inf` is true. A row of coefficients is int32: the step's low word, the parameter's
number and the key, then as FP32 patterns the gradient's multiplier and the coefficients that the update names.
"""

# Triton wraps what is passed to a constexpr by itself, unrolls a static_range, and knows no star in a tuple
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: RUF005

import triton
import triton.language as tl

from duotone.torch.kernels import table
from duotone.torch.kernels.cuda import settings as columns
from duotone.torch.kernels.cuda.formats import bits_of, float_of

# words of a row before the coefficients
FIRST_COEFFICIENT = 5
# parameters per program
BLOCK = 128

_FIRST_COEFFICIENT = tl.constexpr(FIRST_COEFFICIENT)
_STEP = tl.constexpr(table.STEP)
_COUNTERS = tl.constexpr(table.COUNTERS)
_NUMBER = tl.constexpr(table.NUMBER)
_GROUP = tl.constexpr(table.GROUP)
_COLUMNS = tl.constexpr(table.COLUMNS)
_LR = tl.constexpr(columns.LR)
_LR_FLOAT32 = tl.constexpr(columns.LR_FLOAT32)
_LR_FLOAT64 = tl.constexpr(columns.LR_FLOAT64)
_MAXIMIZE = tl.constexpr(columns.MAXIMIZE)
_SEED = tl.constexpr(columns.SEED)
_FIRST_NUMBER = tl.constexpr(columns.FIRST_NUMBER)


# a count or a scalar that happens to be a multiple of 16, or to lie at one, is no reason to compile anew
@triton.jit(do_not_specialize=["grad_multiplier", "found_inf", "count"])
def coefficients_kernel(
    parameters,
    settings,
    coefficients,
    grad_multiplier,
    found_inf,
    count,
    COEFFICIENTS: tl.constexpr,
    SETTINGS: tl.constexpr,
    NUMBERS: tl.constexpr,
    NAMES: tl.constexpr,
    COUNTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the coefficients of up to `BLOCK` parameters, and advance their step counts and counters.

    `COEFFICIENTS` is the update's function, `SETTINGS` its `NamedTuple` of settings and `NUMBERS` the names of those
    between the first and the last two, `NAMES` those of the coefficients, `COUNTERS` how many counters it has.
    """
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = number < count
    row = parameters + number * _COLUMNS
    group = settings + tl.load(row + _GROUP, mask=mask, other=0) * (_FIRST_NUMBER + len(NUMBERS))
    words = coefficients + number * (_FIRST_COEFFICIENT + len(NAMES))
    moves = number < tl.where(tl.load(found_inf), 0, count)

    step_pointer = tl.load(row + _STEP, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    step = tl.load(step_pointer, mask=mask, other=0)
    tl.store(step_pointer, step + 1, mask=moves)
    seed = tl.load(group + _SEED, mask=mask, other=0)
    tl.store(words, step.to(tl.int32), mask=mask)
    tl.store(words + 1, tl.load(row + _NUMBER, mask=mask, other=0).to(tl.int32), mask=mask)
    tl.store(words + 2, seed.to(tl.int32), mask=mask)
    tl.store(words + 3, (seed >> 32).to(tl.int32), mask=mask)
    maximize = tl.load(group + _MAXIMIZE, mask=mask, other=0)
    # a product, since a negation may be a difference from 0, which makes no -0
    _write(words + 4, tl.load(grad_multiplier) * tl.where(maximize != 0, -1.0, 1.0), mask)

    values = (_learning_rate(group, mask),)
    for index in tl.static_range(len(NUMBERS)):
        values = values + (tl.load(group + _FIRST_NUMBER + index, mask=mask, other=0).to(tl.float64, bitcast=True),)
    counter = tl.load(row + _COUNTERS, mask=mask, other=0).to(tl.pointer_type(tl.float64))
    counters = ()
    for index in tl.static_range(COUNTERS):
        counters = counters + (tl.load(counter + index, mask=mask, other=0.0),)
    # what an update computes depends on neither maximize nor seed
    c, counters = COEFFICIENTS(SETTINGS(*values, maximize, seed), step, counters)
    for index in tl.static_range(len(NAMES)):
        _write(words + _FIRST_COEFFICIENT + index, c[index], mask)
    for index in tl.static_range(COUNTERS):
        tl.store(counter + index, counters[index], mask=moves)


@triton.jit
def read_coefficients(words, TYPE: tl.constexpr, NAMES: tl.constexpr):
    """Return the coefficients of a row, scalars in a `NamedTuple`."""
    values = ()
    for index in tl.static_range(len(NAMES)):
        values = values + (float_of(tl.load(words + _FIRST_COEFFICIENT + index), "float32"),)
    return TYPE(*values)


@triton.jit
def read_multiplier(words):
    """Return what the gradient of a row is multiplied by."""
    return float_of(tl.load(words + 4), "float32")


@triton.jit
def read_draws(words):
    """Return the step, the index and the key of a row as uint32 scalars."""
    return (
        tl.load(words).to(tl.uint32),
        tl.load(words + 1).to(tl.uint32),
        tl.load(words + 2).to(tl.uint32),
        tl.load(words + 3).to(tl.uint32),
    )


@triton.jit
def _learning_rate(group, mask):
    """Return the number among the settings, or what a tensor on the device holds just now."""
    number = tl.load(group + _LR, mask=mask, other=0).to(tl.float64, bitcast=True)
    address32 = tl.load(group + _LR_FLOAT32, mask=mask, other=0)
    address64 = tl.load(group + _LR_FLOAT64, mask=mask, other=0)
    held32 = tl.load(address32.to(tl.pointer_type(tl.float32)), mask=address32 != 0, other=0.0)
    held64 = tl.load(address64.to(tl.pointer_type(tl.float64)), mask=address64 != 0, other=0.0)
    return tl.where(address32 != 0, held32.to(tl.float64), tl.where(address64 != 0, held64, number))


@triton.jit
def _write(word, value, mask):
    tl.store(word, bits_of(value.to(tl.float32)), mask=mask)
