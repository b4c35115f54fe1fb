"""Number formats: their published values, what ml_dtypes and NumPy say of them, and their names."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from duotone.errors import FormatError
from duotone.formats import FLOAT64, FORMATS, Format, get_format

# largest number, smallest normal, smallest subnormal, epsilon
PUBLISHED = {
    "float32": ((2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-149, 2.0**-23),
    "tfloat32": ((2 - 2.0**-10) * 2.0**127, 2.0**-126, 2.0**-136, 2.0**-10),
    "float16": (65504.0, 2.0**-14, 2.0**-24, 2.0**-10),
    "bfloat16": ((2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133, 2.0**-7),
    "float8_e4m3fn": (448.0, 2.0**-6, 2.0**-9, 2.0**-3),
    "float8_e5m2": (57344.0, 2.0**-14, 2.0**-16, 2.0**-2),
    "float8_e8m0fnu": (2.0**127, 2.0**-127, None, 1.0),
    "float4_e2m1fn": (6.0, 1.0, 0.5, 0.5),
}
FINFO = [
    *(np.finfo(name) for name in ("float16", "float32", "float64")),
    *(ml_dtypes.finfo(name) for name in FORMATS if name not in ("float16", "float32", "tfloat32")),
]


def test_every_format_has_its_published_values() -> None:
    computed = {
        name: (format.max, format.smallest_normal, format.smallest_subnormal, format.epsilon)
        for name, format in FORMATS.items()
    }
    assert computed == PUBLISHED


@pytest.mark.parametrize("finfo", FINFO, ids=lambda finfo: str(finfo.dtype))
def test_agrees_with_finfo(finfo: np.finfo) -> None:
    format = FLOAT64 if finfo.dtype == np.float64 else FORMATS[str(finfo.dtype)]
    assert format.max == float(finfo.max)
    assert (-format.max if format.signed else format.smallest_normal) == float(finfo.min)
    assert format.smallest_normal == float(finfo.smallest_normal)
    assert format.epsilon == float(finfo.eps)
    assert (format.storage_bits, format.exponent_bits, format.stored_bits) == (finfo.bits, finfo.nexp, finfo.nmant)
    assert (format.min_exponent, format.max_exponent + 1) == (finfo.minexp, finfo.maxexp)
    # of E8M0 it gives the smallest number, although that is normal
    assert (format.smallest_subnormal or format.smallest_normal) == float(finfo.smallest_subnormal)


@pytest.mark.parametrize(
    ("name", "significand_bits", "digits", "exact", "powers", "size_bytes", "memory"),
    [
        ("float32", 24, 7.22, 2**24, 277.0, 4, 1),
        ("tfloat32", 11, 3.31, 2**11, 264.0, 4, 1),
        ("float16", 11, 3.31, 2**11, 40.0, 2, 1 / 2),
        ("bfloat16", 8, 2.41, 2**8, 261.0, 2, 1 / 2),
        ("float8_e4m3fn", 4, 1.20, 2**4, 17.81, 1, 1 / 4),
        ("float8_e5m2", 3, 0.90, 2**3, 31.81, 1, 1 / 4),
        ("float8_e8m0fnu", 1, 0.30, 2, 254.0, 1, 1 / 4),
        ("float4_e2m1fn", 2, 0.60, 4, 3.58, 1 / 2, 1 / 8),
    ],
)
def test_precision_range_and_memory(
    name: str, significand_bits: int, digits: float, exact: int, powers: float, size_bytes: float, memory: float
) -> None:
    format = FORMATS[name]
    assert format.significand_bits == significand_bits
    assert format.decimal_digits == pytest.approx(digits, abs=0.005)
    assert format.max_exact_integer == exact
    assert format.dynamic_range_powers_of_two == pytest.approx(powers, abs=0.01)
    assert (format.bytes_per_value, format.memory_against_float32) == (size_bytes, memory)


@pytest.mark.parametrize(
    ("name", "max_code", "infinity_code", "nan_code", "overflow_code", "sign_mask"),
    [
        ("tfloat32", 0x7F7FE000, 0x7F800000, 0x7FC00000, 0x7F800000, 0x80000000),
        ("float16", 0x7BFF, 0x7C00, 0x7E00, 0x7C00, 0x8000),
        ("float8_e4m3fn", 0x7E, None, 0x7F, 0x7F, 0x80),
        ("float8_e5m2", 0x7B, 0x7C, 0x7E, 0x7C, 0x80),
        ("float8_e8m0fnu", 0xFE, None, 0xFF, 0xFF, 0),
        ("float4_e2m1fn", 0x7, None, None, 0x7, 0x8),
    ],
)
def test_codes(
    name: str, max_code: int, infinity_code: int | None, nan_code: int | None, overflow_code: int, sign_mask: int
) -> None:
    format = FORMATS[name]
    codes = (format.max_code, format.infinity_code, format.nan_code, format.overflow_code, format.sign_mask)
    assert codes == (max_code, infinity_code, nan_code, overflow_code, sign_mask)


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("float32", ("fp32", "f32", "Float32", "single")),
        ("tfloat32", ("tf32", "TF32", "tfloat32")),
        ("float16", ("fp16", "f16", "half", " FP16 ")),
        ("bfloat16", ("bf16", "BFloat16")),
        ("float8_e4m3fn", ("e4m3", "E4M3FN", "fp8_e4m3", "FP8 E4M3FN")),
        ("float8_e5m2", ("e5m2", "fp8_e5m2")),
        ("float8_e8m0fnu", ("e8m0", "fp8_e8m0")),
        ("float4_e2m1fn", ("fp4", "e2m1", "FP4 E2M1")),
    ],
)
def test_get_format_takes_common_spellings(name: str, spellings: tuple[str, ...]) -> None:
    assert {get_format(spelling).name for spelling in spellings} == {name}
    assert get_format(FORMATS[name]) is FORMATS[name]


def test_no_spelling_means_two_formats() -> None:
    spellings = [
        spelling for format in FORMATS.values() for spelling in {format.name, format.label.lower(), *format.aliases}
    ]
    assert len(spellings) == len(set(spellings))
    assert all(spelling == spelling.strip().lower() for spelling in spellings)


def test_unknown_format_gets_a_hint() -> None:
    with pytest.raises(FormatError, match='no number format "blfoat16"; did you mean bfloat16'):
        get_format("blfoat16")
    # another format of ml_dtypes, which must not be taken for float8_e4m3fn
    with pytest.raises(FormatError, match="float8_e4m3fn"):
        get_format("float8_e4m3")


def test_formats_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FORMATS["float32"] = FLOAT64  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["float32"].bias = 0  # type: ignore[misc]


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_every_format_says_what_it_is_for(format: Format) -> None:
    assert format.role.endswith(".")
    assert format.range_risk.endswith(".")
