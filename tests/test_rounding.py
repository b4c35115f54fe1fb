"""The reference rounder against ml_dtypes, NumPy and exact fractions: exhaustive where there are at most 2^16 cases."""

import math
from collections.abc import Callable
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from duotone.errors import FormatError
from duotone.formats import FORMATS, Format
from duotone.rounding import RoundingMode, decode, encode, round_to

MODES: tuple[RoundingMode, ...] = ("nearest_even", "ties_away", "toward_zero", "stochastic")
NARROW = [name for name, format in FORMATS.items() if format.storage_bits <= 16]
ALL_FORMATS = pytest.mark.parametrize("name", FORMATS)
NARROW_FORMATS = pytest.mark.parametrize("name", NARROW)
ALL_MODES = pytest.mark.parametrize("mode", MODES)


def peer_dtype(name: str) -> np.dtype:
    """The dtype of NumPy or ml_dtypes that stores a format of at most 16 bits."""
    return np.dtype(np.float16 if name == "float16" else getattr(ml_dtypes, name))


def peer_encode(values: NDArray, name: str) -> NDArray:
    """Codes of float32 values by NumPy or ml_dtypes."""
    dtype = peer_dtype(name)
    with np.errstate(over="ignore", invalid="ignore"):
        codes = values.astype(dtype).view(f"u{dtype.itemsize}")
    if name == "float8_e8m0fnu":
        # ml_dtypes 0.6 takes these to 2^-126, although 2^-127 is nearer
        codes[(values > 2.0**-127) & (values < 1.5 * 2.0**-127)] = 0
    return codes


def every_code(name: str) -> NDArray:
    dtype = peer_dtype(name)
    return np.arange(1 << FORMATS[name].storage_bits, dtype=f"u{dtype.itemsize}")


def every_number(name: str) -> NDArray:
    """The finite numbers of a format in float32, ascending."""
    with np.errstate(invalid="ignore"):
        values = every_code(name).view(peer_dtype(name)).astype(np.float32)
    return np.unique(values[np.isfinite(values)])


def assert_same_values(actual: NDArray, expected: NDArray) -> None:
    """The same bits, but for the payload of NaN."""
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), is_nan)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))
    np.testing.assert_array_equal(actual[~is_nan], expected[~is_nan])


def exact_rounding(
    value: float, format: Format, mode: RoundingMode, saturate: bool, random_bits: int, width: int
) -> float:
    """What `round_to` must return for a finite value, by fractions."""
    exponent = math.frexp(value)[1] - 1
    spacing = Fraction(2) ** (max(exponent, format.min_exponent) - format.stored_bits)
    below, fraction = divmod(abs(Fraction(value)) / spacing, 1)
    if mode == "nearest_even":
        up = fraction > Fraction(1, 2) or (fraction == Fraction(1, 2) and below % 2 == 1)
    elif mode == "ties_away":
        up = fraction >= Fraction(1, 2)
    elif mode == "stochastic":
        up = math.floor(fraction * 2**width) + random_bits >= 2**width
    else:
        up = False
    rounded = (below + up) * spacing
    if rounded > Fraction(format.max):
        has_inf = format.infinity_code is not None
        clamps = saturate or mode == "toward_zero" or format.nan_code is None
        result = format.max if clamps else math.inf if has_inf else math.nan
    else:
        result = float(rounded)
    if not format.has_zero:
        if value <= 0:
            return math.nan
        result = max(result, format.smallest_normal) if not math.isnan(result) else result
    return math.copysign(result, value)


@st.composite
def finite_values(draw: st.DrawFn, format: Format, dtype: type) -> float:
    """Any finite FP32 or FP64, or one at or beside a number of the format or a midpoint of two."""
    if draw(st.booleans()):
        return draw(st.floats(allow_nan=False, allow_infinity=False, width=32 if dtype is np.float32 else 64))
    significand = draw(st.integers(-(4 << format.stored_bits), 4 << format.stored_bits))
    lowest = format.min_exponent - format.stored_bits - 4
    exponent = draw(st.integers(lowest, format.max_exponent - format.stored_bits))
    with np.errstate(over="ignore", under="ignore"):
        value = dtype(math.ldexp(significand, exponent))
        value = np.nextafter(value, dtype(draw(st.sampled_from([-math.inf, 0.0, math.inf]))))
    return float(value) if np.isfinite(value) else 0.0


@NARROW_FORMATS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decodes_every_code_like_its_peer(name: str, dtype: type) -> None:
    codes = every_code(name)
    with np.errstate(invalid="ignore"):
        expected = codes.view(peer_dtype(name)).astype(dtype)
    decoded = decode(codes, name, dtype)
    assert decoded.dtype == dtype
    assert_same_values(decoded, expected)


@NARROW_FORMATS
def test_encodes_every_number_every_midpoint_and_their_neighbours_like_its_peer(name: str) -> None:
    format, numbers = FORMATS[name], every_number(name)
    # half the spacing beyond the largest number: where overflow begins
    overflow = np.float32(format.max + math.ldexp(format.epsilon, format.max_exponent - 1))
    midpoints = np.concatenate([numbers[:-1] / 2 + numbers[1:] / 2, [-overflow, overflow]]).astype(np.float32)
    points = np.concatenate([numbers, midpoints, [0.0, -0.0, np.inf, -np.inf]]).astype(np.float32)
    values = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    )
    np.testing.assert_array_equal(encode(values, name), peer_encode(values, name))


@NARROW_FORMATS
@pytest.mark.parametrize("source", ["float16", "bfloat16"])
def test_encodes_every_16_bit_input_like_its_peer(name: str, source: str) -> None:
    with np.errstate(invalid="ignore"):
        values = every_code(source).view(peer_dtype(source)).astype(np.float32)
    if name == "float4_e2m1fn":
        values = values[~np.isnan(values)]
    codes, expected = encode(values, name), peer_encode(values, name)
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(codes[~is_nan], expected[~is_nan])
    assert_same_values(decode(codes, name)[is_nan], expected.view(peer_dtype(name)).astype(np.float32)[is_nan])


@ALL_FORMATS
@ALL_MODES
def test_rounds_any_finite_value_exactly_once(name: str, mode: RoundingMode) -> None:
    format = FORMATS[name]

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.sampled_from([np.float32, np.float64]), st.booleans(), st.data())
    def check(dtype: type, saturate: bool, data: st.DataObject) -> None:
        values = data.draw(st.lists(finite_values(format, dtype), min_size=1, max_size=20))
        width = data.draw(st.sampled_from([8, 16, 32, 64]))
        random_bits = data.draw(st.integers(0, 2**width - 1))
        bits = np.full(len(values), random_bits, f"u{width // 8}") if mode == "stochastic" else None
        rounded = round_to(np.array(values, dtype), name, mode=mode, saturate=saturate, random_bits=bits)
        expected = [exact_rounding(value, format, mode, saturate, random_bits, width) for value in values]
        assert rounded.dtype == dtype
        if format.signed:
            assert_same_values(rounded, np.array(expected, dtype))
        else:
            np.testing.assert_array_equal(rounded, np.array(expected, dtype))

    check()


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        # each of these becomes a tie, and falls to the other side, on its way through FP32
        (1 + 2**-8 + 2**-40, "bfloat16", 1 + 2**-7),
        (1 + 3 * 2**-8 - 2**-40, "bfloat16", 1 + 2**-7),
        (1 + 2**-11 + 2**-40, "float16", 1 + 2**-10),
        (1 + 2**-4 + 2**-50, "float8_e4m3fn", 1 + 2**-3),
        (1 + 2**-11 + 2**-52, "tfloat32", 1 + 2**-10),
        (65520 - 2**-30, "float16", 65504),
        (2**-25 + 2**-70, "float16", 2**-24),
        (5 + 2**-45, "float4_e2m1fn", 6),
    ],
)
def test_float64_is_not_rounded_twice(value: float, name: str, expected: float) -> None:
    assert round_to(value, name) == expected
    assert round_to(np.float32(value), name) != expected


def test_float32_from_float64_is_the_hardware_cast() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64).view(np.float64)
    values = values[np.isfinite(values)]
    # mostly FP32's own range, with its subnormals
    values = np.concatenate([values, np.ldexp(np.frexp(values)[0], np.arange(values.size) % 300 - 160)])
    with np.errstate(over="ignore", under="ignore"):
        expected = values.astype(np.float32)
    np.testing.assert_array_equal(encode(values, "float32"), expected.view(np.uint32))


def test_ties_away_to_bfloat16_is_the_master_codec() -> None:
    high = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0x9ABC], np.uint32)
    bits = (high | low).reshape(-1)
    values = bits.view(np.float32)
    finite = np.isfinite(values)
    expected = (bits >> 16) + ((bits >> 15) & 1)
    np.testing.assert_array_equal(encode(values, "bf16", mode="ties_away")[finite], expected[finite])


@NARROW_FORMATS
@ALL_MODES
@pytest.mark.parametrize("saturate", [False, True])
def test_numbers_of_the_format_never_move(name: str, mode: RoundingMode, saturate: bool) -> None:
    codes = every_code(name)
    codes = codes[np.isfinite(decode(codes, name))]
    bits = np.uint32(2**32 - 1) if mode == "stochastic" else None
    for dtype in (np.float32, np.float64):
        values = decode(codes, name, dtype)
        again = encode(values, name, mode=mode, saturate=saturate, random_bits=bits)
        np.testing.assert_array_equal(again, codes)


@ALL_FORMATS
@ALL_MODES
def test_rounding_is_monotonic_and_symmetric(name: str, mode: RoundingMode) -> None:
    rng = np.random.default_rng(1)
    format = FORMATS[name]
    scales = rng.integers(format.min_exponent - format.stored_bits - 2, format.max_exponent, 20_000)
    values = np.sort(np.ldexp(1 + rng.random(20_000), scales))
    # one random number for all values: then stochastic rounding is monotonic as well
    bits = np.uint32(0x9E3779B9) if mode == "stochastic" else None
    rounded = round_to(values, name, mode=mode, random_bits=bits)
    assert np.all(np.diff(rounded) >= 0)
    if format.signed:
        np.testing.assert_array_equal(round_to(-values, name, mode=mode, random_bits=bits), -rounded)


@ALL_FORMATS
def test_every_integer_is_exact_up_to_max_exact_integer(name: str) -> None:
    limit = FORMATS[name].max_exact_integer
    integers = np.arange(max(1, limit - 4096), limit + 1, dtype=np.float64)
    np.testing.assert_array_equal(round_to(integers, name), integers)
    assert round_to(limit + 1.0, name) != limit + 1


@pytest.mark.parametrize(
    ("name", "largest_lost", "smallest_number", "last_kept", "largest", "beyond"),
    [
        ("float16", 2**-25, 2**-24, np.nextafter(65520.0, 0), 65504, np.inf),
        ("float8_e4m3fn", 2**-10, 2**-9, 464.0, 448, np.nan),
        ("float8_e5m2", 2**-17, 2**-16, np.nextafter(61440.0, 0), 57344, np.inf),
        ("float4_e2m1fn", 0.25, 0.5, 6.0, 6, 6),
    ],
)
def test_figures_that_range_risk_names(
    name: str, largest_lost: float, smallest_number: float, last_kept: float, largest: float, beyond: float
) -> None:
    points = [largest_lost, np.nextafter(largest_lost, 1), last_kept, np.nextafter(last_kept, np.inf)]
    np.testing.assert_array_equal(round_to(points, name), [0, smallest_number, largest, beyond])


@ALL_FORMATS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@ALL_MODES
def test_inf(name: str, dtype: type, mode: RoundingMode) -> None:
    format = FORMATS[name]
    bits = np.uint8(0) if mode == "stochastic" else None
    beyond = {"inf_and_nan": np.inf, "nan": np.nan, "none": format.max}[format.specials]
    negative = 1 if format.signed else np.nan
    values = np.array([np.inf, -np.inf], dtype)
    rounded = round_to(values, name, mode=mode, random_bits=bits)
    np.testing.assert_array_equal(rounded, np.array([beyond, -beyond * negative], dtype))
    saturated = round_to(values, name, mode=mode, saturate=True, random_bits=bits)
    np.testing.assert_array_equal(saturated, np.array([format.max, -format.max * negative], dtype))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "float4_e2m1fn"])
@ALL_MODES
@pytest.mark.parametrize("saturate", [False, True])
def test_nan_stays_nan_with_its_sign(name: str, mode: RoundingMode, saturate: bool) -> None:
    bits = np.uint64(2**64 - 1) if mode == "stochastic" else None
    # the payload of the first lies wholly in bits that narrower formats lack
    single = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF], np.uint32)
    double = np.array([0x7FF << 52 | 1, 0xFFF << 52 | 1, 0x7FF8 << 48, 2**64 - 1], np.uint64)
    for values in (single.view(np.float32), double.view(np.float64)):
        rounded = round_to(values, name, mode=mode, saturate=saturate, random_bits=bits)
        assert np.isnan(rounded).all()
        assert np.signbit(rounded).tolist() == [FORMATS[name].signed and negative for negative in (0, 1, 0, 1)]


@pytest.mark.parametrize(
    ("pattern", "name", "code"),
    [
        (np.uint32(0x7FABC123), "float32", 0x7FEBC123),
        (np.uint32(0xFFABC123), "tfloat32", 0xFFEBC000),
        (np.uint32(0x7FABC123), "bfloat16", 0x7FEB),
        (np.uint32(0x7FABC123), "float16", 0x7F5E),
        (np.uint32(0xFFABC123), "float8_e5m2", 0xFF),
        (np.uint32(0xFFABC123), "float8_e4m3fn", 0xFF),
        (np.uint32(0xFFABC123), "float8_e8m0fnu", 0xFF),
        (np.uint64(0xFFF5_7824_6000_0001), "float32", 0xFFEBC123),
        (np.uint64(0x7FF0_0000_0000_0001), "bfloat16", 0x7FC0),
    ],
)
def test_nan_keeps_leading_payload_and_becomes_quiet(pattern: np.unsignedinteger, name: str, code: int) -> None:
    values = np.array([pattern]).view(f"f{pattern.itemsize}")
    assert encode(values, name).tolist() == [code]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_nan_code_survives_decoding_and_encoding(name: str, dtype: type) -> None:
    codes = every_code(name)
    decoded = decode(codes, name, dtype)
    codes, decoded = codes[np.isnan(decoded)], decoded[np.isnan(decoded)]
    quiet = (FORMATS[name].nan_code or 0) & ~(FORMATS[name].infinity_code or 0)
    np.testing.assert_array_equal(encode(decoded, name), codes | quiet)


def test_nan_is_refused_where_the_format_has_none() -> None:
    for saturate in (False, True):
        with pytest.raises(FormatError, match="float4_e2m1fn has no NaN, got 1 in 2 values"):
            round_to([1.0, np.nan], "fp4", saturate=saturate)


@ALL_MODES
def test_e8m0_has_no_zero_no_sign_and_nothing_below_its_smallest(mode: RoundingMode) -> None:
    bits = np.uint8(0) if mode == "stochastic" else None
    values = [0.0, -0.0, -1.0, 2.0**-128, 5e-324, 1.26 * 2.0**-100]
    rounded = round_to(values, "e8m0", mode=mode, random_bits=bits)
    expected = [np.nan, np.nan, np.nan, 2.0**-127, 2.0**-127, 2.0**-100]
    np.testing.assert_array_equal(rounded, expected)


@pytest.mark.parametrize("saturate", [False, True])
def test_tfloat32_codes_are_float32_patterns_with_low_bits_clear(saturate: bool) -> None:
    values = np.array([np.pi, -1e-40, 3.4e38, 3.4028234e38], np.float32)
    codes = encode(values, "tf32", saturate=saturate)
    assert codes.dtype == np.uint32
    assert not np.any(codes & 0x1FFF)
    np.testing.assert_array_equal(codes.view(np.float32), round_to(values, "tf32", saturate=saturate))


def test_shape_strides_byte_order_and_emptiness_do_not_matter() -> None:
    values = np.random.default_rng(2).standard_normal((6, 8)).astype(np.float32)
    expected = round_to(values, "bf16")
    assert round_to(values[0, 0], "bf16").shape == ()
    assert encode(values[0, 0], "bf16") == encode(values, "bf16")[0, 0]
    assert round_to(np.empty((3, 0), np.float64), "bf16").shape == (3, 0)
    np.testing.assert_array_equal(round_to(values[::2, ::-3], "bf16"), expected[::2, ::-3])
    np.testing.assert_array_equal(round_to(values.T, "bf16"), expected.T)
    for dtype in (">f4", ">f8", "<f4", "<f8"):
        rounded = round_to(values.astype(dtype), "bf16")
        assert rounded.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(rounded, expected)
    codes = encode(values, "bf16")
    np.testing.assert_array_equal(decode(codes.astype(">u2")[:, ::2], "bf16"), expected[:, ::2])
    bits = np.arange(8, dtype=">u2") * 8191
    np.testing.assert_array_equal(
        round_to(values, "bf16", mode="stochastic", random_bits=bits),
        round_to(values, "bf16", mode="stochastic", random_bits=np.tile(bits.astype("<u2"), (6, 1))),
    )


def test_the_values_given_are_left_alone() -> None:
    values = np.array([1.001, np.pi], np.float32)
    before = values.copy()
    round_to(values, "float32")[:] = 0
    round_to(values, "bf16")
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: round_to([1.0], "bf17"), 'no number format "bf17"'),
        (
            lambda: round_to([1.0], "bf16", mode="nearest"),  # pyright: ignore[reportArgumentType]
            'no rounding mode "nearest"; did you mean nearest_even',
        ),
        (lambda: round_to([1], "bf16"), "values must be float32 or float64, got int64; convert them first"),
        (lambda: encode(np.ones(2, np.float16), "e4m3"), "values must be float32 or float64, got float16"),
        (lambda: round_to([1.0], "bf16", mode="stochastic"), 'mode "stochastic" needs random_bits'),
        (
            lambda: round_to([1.0], "bf16", random_bits=np.zeros(1, np.uint32)),
            'mode "nearest_even" takes no random_bits',
        ),
        (
            lambda: round_to([1.0], "bf16", mode="stochastic", random_bits=[1]),
            "random_bits must be unsigned integers, got int64",
        ),
        (
            lambda: round_to([1.0, 2.0], "bf16", mode="stochastic", random_bits=np.zeros(3, np.uint32)),
            r"random_bits of shape \(3,\) do not broadcast to \(2,\)",
        ),
        (lambda: decode(np.zeros(1, np.uint8), "bf16"), "codes of bfloat16 are uint16, got uint8"),
        (lambda: decode(np.array([0x10], np.uint8), "fp4"), "codes of float4_e2m1fn leave the bits 0xf0 clear"),
        (lambda: decode(np.array([1], np.uint32), "tf32"), "codes of tfloat32 leave the bits 0x1fff clear"),
        (lambda: decode(np.zeros(1, np.uint16), "bf16", np.float16), "values must be float32 or float64"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        call()
