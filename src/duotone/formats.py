"""Number formats as data: what each can hold, and where it stands in mixed precision training.

A number is `(-1)^sign * significand * 2^(exponent_field - bias)`. A format states its fields; all else is
computed from them. Sources: IEEE 754-2019, section 3.4; Micikevicius et al. 2022, "FP8 Formats for Deep
Learning"; OCP Microscaling Formats 1.0, section 5 (FP4, E8M0). Formats that nobody trains with are left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from duotone.errors import FormatError, nearest_names


@dataclass(frozen=True, kw_only=True)
class Format:
    """A binary floating-point format: its fields, two remarks on its use, and what follows from the fields.

    A code is the stored pattern of a number as an unsigned integer: from the top the sign, the exponent, the
    stored significand, and zeros if storage is wider than that (TF32). The properties `..._code` have sign 0.

    Attributes:
        name: the name that ml_dtypes uses.
        label: the short name that people say.
        aliases: further spellings that `get_format` takes, in lower case.
        storage_bits: bits per value in memory.
        exponent_bits: width of the exponent field.
        stored_bits: width of the significand field, which leaves out the hidden bit.
        bias: what the exponent field exceeds the exponent by.
        signed: whether there is a sign bit.
        has_zero: whether exponent field 0 holds zero and the subnormals, or is one more normal exponent.
        specials: `"inf_and_nan"` gives them the top exponent, as IEEE 754 does; `"nan"` has no Inf, and its
            only NaN is the code of all ones; `"none"` has neither.
        role: where the format stands in mixed precision training.
        range_risk: its risk of underflow and of overflow in training.
    """

    name: str
    label: str
    aliases: tuple[str, ...] = ()
    storage_bits: int
    exponent_bits: int
    stored_bits: int
    bias: int
    signed: bool = True
    has_zero: bool = True
    specials: Literal["inf_and_nan", "nan", "none"] = "inf_and_nan"
    role: str
    range_risk: str

    @property
    def significand_bits(self) -> int:
        """Bits of the significand, the hidden bit included."""
        return self.stored_bits + 1

    @property
    def padding_bits(self) -> int:
        """Zero bits below the significand in a stored code."""
        return self.storage_bits - self.signed - self.exponent_bits - self.stored_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return int(self.has_zero) - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number."""
        return (self.max_code >> (self.padding_bits + self.stored_bits)) - self.bias

    @property
    def magnitude_mask(self) -> int:
        """The bits of a code that are exponent or significand."""
        return ((1 << (self.exponent_bits + self.stored_bits)) - 1) << self.padding_bits

    @property
    def sign_mask(self) -> int:
        """The sign's bit in a code, 0 if there is none."""
        return self.signed << (self.storage_bits - 1)

    @property
    def infinity_code(self) -> int | None:
        """Code of Inf, None if there is none."""
        if self.specials != "inf_and_nan":
            return None
        return ((1 << self.exponent_bits) - 1) << (self.stored_bits + self.padding_bits)

    @property
    def nan_code(self) -> int | None:
        """Code of the quiet NaN without payload, None if there is no NaN."""
        if self.infinity_code is not None:
            return self.infinity_code | (1 << (self.stored_bits - 1 + self.padding_bits))
        return self.magnitude_mask if self.specials == "nan" else None

    @property
    def max_code(self) -> int:
        """Code of the largest finite number."""
        if self.specials == "none":
            return self.magnitude_mask
        first_special = self.magnitude_mask if self.infinity_code is None else self.infinity_code
        return first_special - (1 << self.padding_bits)

    @property
    def overflow_code(self) -> int:
        """Code of what a number too large becomes: Inf if there is one, else NaN, else the largest number."""
        return next(code for code in (self.infinity_code, self.nan_code, self.max_code) if code is not None)

    @property
    def max(self) -> float:
        """Largest finite number."""
        significand = (self.max_code >> self.padding_bits) % (1 << self.stored_bits) + (1 << self.stored_bits)
        return math.ldexp(significand, self.max_exponent - self.stored_bits)

    @property
    def smallest_normal(self) -> float:
        """Smallest positive number with a full significand."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float | None:
        """Smallest positive subnormal number, None if there are none."""
        return math.ldexp(1.0, self.min_exponent - self.stored_bits) if self.has_zero else None

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger number."""
        return math.ldexp(1.0, -self.stored_bits)

    @property
    def dynamic_range_powers_of_two(self) -> float:
        """`log2(largest / smallest positive number)`: how far a power-of-two scale has to reach."""
        return math.log2(self.max) - math.log2(self.smallest_subnormal or self.smallest_normal)

    @property
    def decimal_digits(self) -> float:
        """Decimal digits that the significand is worth: `significand_bits * log10(2)`."""
        return self.significand_bits * math.log10(2)

    @property
    def max_exact_integer(self) -> int:
        """Largest integer up to which every positive integer is a number of the format."""
        return 1 << self.significand_bits

    @property
    def bytes_per_value(self) -> float:
        """Bytes per value in memory; FP4 packs two into one."""
        return self.storage_bits / 8

    @property
    def memory_against_float32(self) -> float:
        """Memory of a value as a fraction of FP32's."""
        return self.storage_bits / 32


# not one of FORMATS, because nothing trains in it; the reference rounder reads and writes it
FLOAT64 = Format(
    name="float64",
    label="FP64",
    storage_bits=64,
    exponent_bits=11,
    stored_bits=52,
    bias=1023,
    role="Reference results that others are measured against.",
    range_risk="None.",
)

_ALL = (
    Format(
        name="float32",
        label="FP32",
        aliases=("f32", "single"),
        storage_bits=32,
        exponent_bits=8,
        stored_bits=23,
        bias=127,
        role="Master weights, optimizer moments, reductions, norms, softmax and losses.",
        range_risk="None in practice: gradients and activations fit unscaled.",
    ),
    Format(
        name="tfloat32",
        label="TF32",
        storage_bits=32,
        exponent_bits=8,
        stored_bits=10,
        bias=127,
        role="How tensor cores read the FP32 factors of a matrix product; sums are FP32. Saves time only.",
        range_risk="None in practice: FP32's exponent.",
    ),
    Format(
        name="float16",
        label="FP16",
        aliases=("f16", "half"),
        storage_bits=16,
        exponent_bits=5,
        stored_bits=10,
        bias=15,
        role="Weights, activations and gradients, with FP32 masters and a loss scale.",
        range_risk="High: up to 2^-25 a gradient becomes 0, from 65520 on a value becomes Inf.",
    ),
    Format(
        name="bfloat16",
        label="BF16",
        storage_bits=16,
        exponent_bits=8,
        stored_bits=7,
        bias=127,
        role="Weights, activations and gradients, without a loss scale. FP32 masters or stochastic rounding "
        "keep the updates below 1/512 of a weight, which are lost otherwise.",
        range_risk="None in practice: FP32's exponent. What is short is precision.",
    ),
    Format(
        name="float8_e4m3fn",
        label="FP8 E4M3FN",
        # not float8_e4m3: ml_dtypes means another format by that, one with Inf
        aliases=("e4m3", "e4m3fn", "fp8_e4m3", "fp8_e4m3fn"),
        storage_bits=8,
        exponent_bits=4,
        stored_bits=3,
        bias=7,
        specials="nan",
        role="Weights and activations as factors of a matrix product, scaled per tensor or block.",
        range_risk="High, so it needs scales: up to 2^-10 a value becomes 0, above 464 NaN.",
    ),
    Format(
        name="float8_e5m2",
        label="FP8 E5M2",
        aliases=("e5m2", "fp8_e5m2"),
        storage_bits=8,
        exponent_bits=5,
        stored_bits=2,
        bias=15,
        role="Gradients as factors of a matrix product, scaled per tensor or block.",
        range_risk="High, so it needs scales: up to 2^-17 a gradient becomes 0, from 61440 on Inf.",
    ),
    Format(
        name="float8_e8m0fnu",
        label="FP8 E8M0",
        aliases=("e8m0", "e8m0fnu", "fp8_e8m0", "fp8_e8m0fnu"),
        storage_bits=8,
        exponent_bits=8,
        stored_bits=0,
        bias=127,
        signed=False,
        has_zero=False,
        specials="nan",
        role="The scale that a block of 32 FP8 or FP4 values shares; no tensor of its own.",
        range_risk="Low: its powers of two span FP32's normal range. There is no 0; it becomes NaN.",
    ),
    Format(
        name="float4_e2m1fn",
        label="FP4 E2M1",
        aliases=("e2m1", "e2m1fn", "fp4", "fp4_e2m1", "fp4_e2m1fn"),
        storage_bits=4,
        exponent_bits=2,
        stored_bits=1,
        bias=1,
        specials="none",
        role="Weights and activations as factors of a matrix product, always with a scale per block.",
        range_risk="Certain without scales: up to 0.25 a value becomes 0, above 6 it becomes 6.",
    ),
)

FORMATS: Mapping[str, Format] = MappingProxyType({format.name: format for format in _ALL})


def get_format(name: str | Format) -> Format:
    """Return the format of a name, whatever its common spelling and case.

    Args:
        name: a name, a label or an alias of one of `FORMATS`; a `Format` is returned as it is.

    Raises:
        FormatError: no format has that name.

    >>> get_format("BF16").name, get_format("half").name, get_format("e4m3").max
    ('bfloat16', 'float16', 448.0)
    """
    if isinstance(name, Format):
        return name
    wanted = name.strip().lower()
    for format in FORMATS.values():
        if wanted in (format.name, format.label.lower(), *format.aliases):
            return format
    raise FormatError(f'no number format "{name}"; {nearest_names(wanted, FORMATS)}')
