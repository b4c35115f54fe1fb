"""The reference rounder: every format, every mode, bit for bit, by integer arithmetic on stored patterns.

A finite number is `significand * 2^exponent`. Where the target's spacing is `2^(exponent + shift)`, it keeps
`significand >> shift`, and the mode decides from the bits discarded whether to add one (IEEE 754-2019,
section 4.3; stochastic: Croci et al. 2022, doi 10.1098/rsos.211631). FP32 or FP64 is rounded once, never twice.
Other directed modes and exception flags are left out. Nothing here is fast; the kernels are.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from duotone.errors import FormatError, nearest_names
from duotone.formats import FLOAT64, FORMATS, Format, get_format

RoundingMode = Literal["nearest_even", "ties_away", "toward_zero", "stochastic"]

# (kept, discarded, shift), all int64 -> where the kept magnitude takes one more, as booleans
_RoundsUp = Callable[[NDArray, NDArray, NDArray], NDArray]

# where the leading bit of a significand is put: FP64's 52 bits fit below it with bits left to discard, and half
# of the widest shift, 2^62, exceeds every significand, so one shifted out whole is never rounded up
_TOP_BIT = 61
_MAX_SHIFT = 63


def round_to(
    values: ArrayLike,
    format: str | Format,
    *,
    mode: RoundingMode = "nearest_even",
    saturate: bool = False,
    random_bits: ArrayLike | None = None,
) -> NDArray:
    """Round every value to a number of `format`: `decode(encode(values, ...))` in the dtype of the values.

    Args:
        values: FP32 or FP64, any shape, strides and byte order.
        format: the format to round to, or a spelling of its name.
        mode: see `encode`.
        saturate: see `encode`.
        random_bits: see `encode`.

    Returns:
        An array of the shape and dtype of `values`. NaN, Inf, -0 and overflow become what `encode` says.

    Raises:
        FormatError: as `encode`.

    >>> round_to([1 + 2**-9, 0.1, 65520.0], "bf16").tolist()
    [1.0, 0.10009765625, 65536.0]
    >>> round_to([65519.0, 65520.0, 2.0**-25, -1e-9], "fp16").tolist()
    [65504.0, inf, 0.0, -0.0]
    """
    values = np.asarray(values)
    codes = encode(values, format, mode=mode, saturate=saturate, random_bits=random_bits)
    return decode(codes, format, dtype=values.dtype)


def encode(
    values: ArrayLike,
    format: str | Format,
    *,
    mode: RoundingMode = "nearest_even",
    saturate: bool = False,
    random_bits: ArrayLike | None = None,
) -> NDArray:
    """Round every value to `format` and return the codes of the results.

    Stochastic rounding takes the fraction of the target's spacing that would be discarded, keeps its first
    `k` bits, adds the `k` random bits, and moves up in magnitude on a carry:
    `up = floor(fraction * 2^k) + random_bits >= 2^k`, so `P(up) = floor(fraction * 2^k) / 2^k`.
    A number of the format never moves, and no value moves past its two neighbours. From FP32 to
    BF16 with 16 random bits this is `(bits + random_bits) >> 16`.

    What becomes of
    - NaN: a quiet NaN of the same sign with the leading payload bits that the format has room for;
    - Inf, and finite values that round beyond the largest number: Inf; where there is no Inf (E4M3FN, E8M0),
      NaN; where there is neither (E2M1), the largest number, as in ml_dtypes. `toward_zero` makes the largest
      number of finite values in every format. `stochastic` takes the number after the largest for
      one that overflows;
    - -0 and what underflows: zero of the same sign. Subnormals are rounded like other values;
    - E8M0, which has no sign and no zero: zeros and negative values become NaN, and positive values below
      2^-127 become 2^-127 in every mode. Its one-bit significand is odd, so `nearest_even` moves ties up.
      Both are as in ml_dtypes.

    Args:
        values: FP32 or FP64, any shape, strides and byte order.
        format: the format to round to, or a spelling of its name.
        mode: `nearest_even`, `ties_away` (nearest, ties away from zero), `toward_zero` or `stochastic`.
        saturate: turn Inf and what overflows into the largest number with their sign, as OCP's saturating
            conversion does.
        random_bits: for `stochastic` alone: unsigned integers of `k` = 8, 16, 32 or 64 bits that broadcast to
            the shape of `values`, independent and uniform, from the caller's generator.

    Returns:
        An array of the shape of `values`: uint32 for FP32 and TF32 (whose low 13 bits are 0), uint16 for
        16-bit formats, uint8 for narrower ones (FP4 in the low 4 bits).

    Raises:
        FormatError: an unknown format or mode; values of another dtype; random bits missing, not asked for,
            or of a wrong dtype or shape; NaN in a format that has none (E2M1).

    >>> encode([1.0, -2.0, np.inf], "bf16").tolist() == [0x3F80, 0xC000, 0x7F80]
    True
    >>> encode([449.0, 465.0], "e4m3").tolist(), encode([449.0, 465.0], "e4m3", saturate=True).tolist()
    ([126, 127], [126, 126])
    """
    target = get_format(format)
    values = np.asarray(values)
    source = _float_format(values.dtype)
    patterns = values.astype(values.dtype.newbyteorder("="), copy=False).view(_code_dtype(source))
    return _convert(
        patterns,
        source,
        target,
        rounds_up=_rounds_up(mode, random_bits, values.shape),
        overflow_code=target.max_code if saturate or mode == "toward_zero" else target.overflow_code,
        infinity_code=target.max_code if saturate else target.overflow_code,
    )


def decode(codes: ArrayLike, format: str | Format, dtype: DTypeLike = np.float32) -> NDArray:
    """Return the numbers that codes stand for, exactly.

    Args:
        codes: what `encode` returns for the format, any shape, strides and byte order.
        format: the format of the codes, or a spelling of its name.
        dtype: float32 or float64, in any byte order.

    Returns:
        An array of the shape of `codes` and of `dtype`. -0, Inf and subnormals are kept; NaN becomes a quiet
        NaN of the same sign and payload.

    Raises:
        FormatError: an unknown format; codes of another dtype or with bits outside the format; another
            `dtype`.

    >>> decode(np.array([0x3C00, 0x0001, 0xFC00], np.uint16), "fp16").tolist()
    [1.0, 5.960464477539063e-08, -inf]
    """
    source = get_format(format)
    dtype = np.dtype(dtype)
    target = _float_format(dtype)
    codes = np.asarray(codes)
    if codes.dtype.newbyteorder("=") != _code_dtype(source):
        raise FormatError(
            f"codes of {source.name} are {_code_dtype(source)}, got {codes.dtype}; use what encode returns"
        )
    foreign_bits = np.iinfo(codes.dtype).max & ~(source.sign_mask | source.magnitude_mask)
    if np.any(codes & foreign_bits):
        raise FormatError(f"codes of {source.name} leave the bits {foreign_bits:#x} clear, got some set; clear them")
    patterns = _convert(
        codes,
        source,
        target,
        rounds_up=_nearest_even,
        overflow_code=target.overflow_code,
        infinity_code=target.overflow_code,
    )
    return patterns.view(dtype.newbyteorder("=")).astype(dtype, copy=False)


def _convert(
    codes: NDArray,
    source: Format,
    target: Format,
    *,
    rounds_up: _RoundsUp,
    overflow_code: int,
    infinity_code: int,
) -> NDArray:
    """Turn codes of one format into codes of another; `..._code` say what overflow and Inf become."""
    shape = codes.shape
    # in one dimension, because NumPy makes scalars of results that have none
    codes = codes.reshape(-1).astype(np.uint64)
    negative = (codes & source.sign_mask) != 0
    magnitude = (codes & source.magnitude_mask).astype(np.int64)
    is_infinite = magnitude == (-1 if source.infinity_code is None else source.infinity_code)
    is_nan = (magnitude > source.max_code) & ~is_infinite

    significand, exponent = _unpack(magnitude, source)
    result = _round(significand, exponent, target, rounds_up)
    result = np.where(result > target.max_code, overflow_code, result)
    result = np.where(is_infinite, infinity_code, result)

    if not target.signed:
        is_nan |= negative
    if not target.has_zero:
        is_nan |= significand == 0
    if target.nan_code is not None:
        result = np.where(is_nan, target.nan_code | _payload(magnitude, source, target), result)
    elif is_nan.any():
        raise FormatError(f"{target.name} has no NaN, got {is_nan.sum()} in {is_nan.size} values; replace them first")
    result |= np.where(negative, target.sign_mask, 0)
    return result.astype(_code_dtype(target)).reshape(shape)


def _unpack(magnitude: NDArray, source: Format) -> tuple[NDArray, NDArray]:
    """Return significand and exponent with `value = significand * 2^(exponent - _TOP_BIT)`.

    The significand has its leading bit at `_TOP_BIT`, or is 0.
    """
    unpadded = magnitude >> source.padding_bits
    exponent_field = unpadded >> source.stored_bits
    hidden_bit = (exponent_field >= int(source.has_zero)).astype(np.int64) << source.stored_bits
    significand = (unpadded & ((1 << source.stored_bits) - 1)) | hidden_bit
    # frexp gives the bit length, and exactly: a significand has at most 53 bits
    length = np.frexp(significand.astype(np.float64))[1].astype(np.int64)
    lowest = np.maximum(exponent_field, int(source.has_zero)) - source.bias - source.stored_bits
    return significand << (_TOP_BIT + 1 - length), lowest + length - 1


def _round(significand: NDArray, exponent: NDArray, target: Format, rounds_up: _RoundsUp) -> NDArray:
    """Return the code of the rounded magnitude, as if the exponent field had no upper end."""
    # below the smallest normal number the spacing shrinks no further; zero belongs there too
    spaced_as = np.where(significand == 0, target.min_exponent, np.maximum(exponent, target.min_exponent))
    shift = _TOP_BIT - target.stored_bits + np.maximum(spaced_as - exponent, 0)
    kept = significand >> np.minimum(shift, _MAX_SHIFT)
    discarded = significand - (kept << np.minimum(shift, _MAX_SHIFT))
    kept += rounds_up(kept, discarded, shift)
    # a carry out of the significand runs on into the exponent field, and that is the next number's code
    code = ((spaced_as - target.min_exponent) << target.stored_bits) + kept
    if not target.has_zero:
        # exponent field 0 has a hidden bit as well, and below its number there is none to go to
        code = np.maximum(code - (1 << target.stored_bits), 0)
    return code << target.padding_bits


def _payload(magnitude: NDArray, source: Format, target: Format) -> NDArray | int:
    """Return the leading payload bits of NaNs, in place for a target code; 0 where either side has none."""
    if source.infinity_code is None or target.infinity_code is None:
        return 0
    payload = (magnitude >> source.padding_bits) & ((1 << source.stored_bits) - 1)
    wider_by = target.stored_bits - source.stored_bits
    return (payload << max(wider_by, 0) >> max(-wider_by, 0)) << target.padding_bits


def _rounds_up(mode: str, random_bits: ArrayLike | None, shape: tuple[int, ...]) -> _RoundsUp:
    """Return what a mode decides by; random bits come with `stochastic` and with no other."""
    if mode == "stochastic":
        if random_bits is None:
            raise FormatError('mode "stochastic" needs random_bits; pass unsigned integers from your generator')
        return _stochastic(np.asarray(random_bits), shape)
    if random_bits is not None:
        raise FormatError(f'mode "{mode}" takes no random_bits; leave them out or use mode "stochastic"')
    by_mode = {"nearest_even": _nearest_even, "ties_away": _ties_away, "toward_zero": _toward_zero}
    if mode not in by_mode:
        raise FormatError(f'no rounding mode "{mode}"; {nearest_names(mode, get_args(RoundingMode))}')
    return by_mode[mode]


def _half(shift: NDArray) -> NDArray:
    return np.int64(1) << (np.minimum(shift, _MAX_SHIFT) - 1)


def _nearest_even(kept: NDArray, discarded: NDArray, shift: NDArray) -> NDArray:
    return discarded + (kept & 1) > _half(shift)


def _ties_away(kept: NDArray, discarded: NDArray, shift: NDArray) -> NDArray:
    return discarded >= _half(shift)


def _toward_zero(kept: NDArray, discarded: NDArray, shift: NDArray) -> NDArray:
    return np.zeros(kept.shape, bool)


def _stochastic(random_bits: NDArray, shape: tuple[int, ...]) -> _RoundsUp:
    """Return what adds random bits to the discarded fraction of values of a shape."""
    if random_bits.dtype.kind != "u":
        raise FormatError(f"random_bits must be unsigned integers, got {random_bits.dtype}; pass uint32")
    try:
        flat_bits = np.broadcast_to(random_bits, shape).reshape(-1)
    except ValueError:
        raise FormatError(
            f"random_bits of shape {random_bits.shape} do not broadcast to {shape}; pass one for each value"
        ) from None
    width = 8 * random_bits.dtype.itemsize
    largest = np.uint64(2**width - 1)

    def rounds_up(kept: NDArray, discarded: NDArray, shift: NDArray) -> NDArray:
        # the first `width` of the `shift` bits discarded
        left = np.maximum(width - shift, 0).astype(np.uint64)
        right = np.minimum(np.maximum(shift - width, 0), _MAX_SHIFT).astype(np.uint64)
        fraction = discarded.astype(np.uint64) << left >> right
        # fraction + flat_bits > largest, without the sum that may overflow
        return flat_bits > largest - fraction

    return rounds_up


def _float_format(dtype: np.dtype) -> Format:
    """Return the format of float32 or float64 arrays."""
    known = {"float32": FORMATS["float32"], "float64": FLOAT64}
    if dtype.name not in known:
        raise FormatError(f"values must be float32 or float64, got {dtype}; convert them first")
    return known[dtype.name]


def _code_dtype(format: Format) -> np.dtype:
    """Return the unsigned integer dtype that holds one code of the format."""
    return np.dtype(f"u{max(1, format.storage_bits // 8)}")
