"""What an update computes once per parameter: FP32 coefficients from FP64 arithmetic, and the words of random bits.

One launch over all parameters, before the update itself. It reads step counts and beta products, hands on what they
were, and advances them unless `found_inf` is true. A row of coefficients is `WORDS` int32: the eight coefficients of
`rules.py` as FP32 patterns, the factor of the gradient first, then the step's low word, the index, and the key.
"""

# Triton wraps what is passed to a constexpr by itself
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from duotone.torch.kernels import table
from duotone.torch.kernels.cuda import settings as columns
from duotone.torch.kernels.cuda.formats import bits_of, float_of

# int32 words per parameter
WORDS = 12
# parameters per program
BLOCK = 128

_WORDS = tl.constexpr(WORDS)
_STEP = tl.constexpr(table.STEP)
_BETA_PRODUCTS = tl.constexpr(table.BETA_PRODUCTS)
_NUMBER = tl.constexpr(table.NUMBER)
_GROUP = tl.constexpr(table.GROUP)
_PARAMETER_COLUMNS = tl.constexpr(table.GROUP + 1)
_SETTING_COLUMNS = tl.constexpr(columns.COLUMNS)
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
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the coefficients of up to `BLOCK` parameters, and advance their step counts and beta products."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = number < count
    row = parameters + number * _PARAMETER_COLUMNS
    group = settings + tl.load(row + _GROUP, mask=mask, other=0) * _SETTING_COLUMNS
    words = coefficients + number * _WORDS
    moves = number < tl.where(tl.load(found_inf), 0, count)
    lr = _learning_rate(group, mask)

    step_pointer = tl.load(row + _STEP, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    step = tl.load(step_pointer, mask=mask, other=0)
    tl.store(step_pointer, step + 1, mask=moves)

    maximize = tl.load(group + _MAXIMIZE, mask=mask, other=0)
    # a product, since a negation may be a difference from 0, which makes no -0
    _write(words, 0, tl.load(grad_multiplier) * tl.where(maximize != 0, -1.0, 1.0), mask)
    if RULE == "adamw":
        products = tl.load(row + _BETA_PRODUCTS, mask=mask, other=0).to(tl.pointer_type(tl.float64))
        _adamw(words, group, lr, products, mask, moves)
    elif RULE == "sgd":
        _sgd(words, group, lr, step, mask)
    else:
        _lion(words, group, lr, mask)

    seed = tl.load(group + _SEED, mask=mask, other=0)
    tl.store(words + 8, step.to(tl.int32), mask=mask)
    tl.store(words + 9, tl.load(row + _NUMBER, mask=mask, other=0).to(tl.int32), mask=mask)
    tl.store(words + 10, seed.to(tl.int32), mask=mask)
    tl.store(words + 11, (seed >> 32).to(tl.int32), mask=mask)


@triton.jit
def read_coefficients(words):
    """Return the eight coefficients of a row as scalars."""
    return (
        float_of(tl.load(words), "float32"),
        float_of(tl.load(words + 1), "float32"),
        float_of(tl.load(words + 2), "float32"),
        float_of(tl.load(words + 3), "float32"),
        float_of(tl.load(words + 4), "float32"),
        float_of(tl.load(words + 5), "float32"),
        float_of(tl.load(words + 6), "float32"),
        float_of(tl.load(words + 7), "float32"),
    )


@triton.jit
def read_draws(words):
    """Return the step, the index and the key of a row as uint32 scalars."""
    return (
        tl.load(words + 8).to(tl.uint32),
        tl.load(words + 9).to(tl.uint32),
        tl.load(words + 10).to(tl.uint32),
        tl.load(words + 11).to(tl.uint32),
    )


@triton.jit
def _adamw(words, group, lr, products, mask, moves):
    beta1, beta2 = _number(group, 0, mask), _number(group, 1, mask)
    eps, weight_decay = _number(group, 2, mask), _number(group, 3, mask)
    product1 = tl.load(products, mask=mask, other=0.0) * beta1
    product2 = tl.load(products + 1, mask=mask, other=0.0) * beta2
    root = tl.sqrt(1.0 - product2)
    _write(words, 1, lr * root / (1.0 - product1), mask)
    _write(words, 2, eps * root, mask)
    _write(words, 3, 1.0 - lr * weight_decay, mask)
    _write(words, 4, 1.0 - beta1, mask)
    _write(words, 5, beta2, mask)
    _write(words, 6, 1.0 - beta2, mask)
    tl.store(products, product1, mask=moves)
    tl.store(products + 1, product2, mask=moves)


@triton.jit
def _sgd(words, group, lr, step, mask):
    weight_decay = _number(group, 2, mask)
    _write(words, 1, lr, mask)
    _write(words, 2, _number(group, 0, mask), mask)
    _write(words, 3, 1.0 - _number(group, 1, mask), mask)
    _write(words, 4, weight_decay, mask)
    _write(words, 5, weight_decay != 0.0, mask)
    _write(words, 6, _number(group, 3, mask), mask)
    _write(words, 7, step == 0, mask)


@triton.jit
def _lion(words, group, lr, mask):
    beta1, beta2 = _number(group, 0, mask), _number(group, 1, mask)
    _write(words, 1, lr, mask)
    _write(words, 2, 1.0 - lr * _number(group, 2, mask), mask)
    _write(words, 3, beta1, mask)
    _write(words, 4, 1.0 - beta1, mask)
    _write(words, 5, beta2, mask)
    _write(words, 6, 1.0 - beta2, mask)


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
def _number(group, NUMBER: tl.constexpr, mask):
    return tl.load(group + _FIRST_NUMBER + NUMBER, mask=mask, other=0).to(tl.float64, bitcast=True)


@triton.jit
def _write(words, COLUMN: tl.constexpr, value, mask):
    tl.store(words + COLUMN, bits_of(value.to(tl.float32)), mask=mask)
