"""Sizes in bytes as people write them: 2GB, 1.5 GiB, 512mb. Powers of 1000, and of 1024 with an i."""

import re
from fractions import Fraction

from duotone.errors import CompareError

UNITS = ("B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB")
_BYTES = {
    **{unit.lower(): 1000**power for power, unit in enumerate(UNITS[:5])},
    **{unit.lower(): 1024**power for power, unit in enumerate(UNITS[5:], 1)},
}


def parse_size(text: str) -> int:
    """Return a size in bytes, rounded to a whole number.

    Args:
        text: a decimal number and a unit of `UNITS`, in upper or lower case, with or without a space.

    Raises:
        CompareError: it is none, or less than one byte.

    >>> parse_size("2GB"), parse_size("1.5 KiB")
    (2000000000, 1536)
    >>> parse_size("2G")
    Traceback (most recent call last):
    duotone.errors.CompareError: "2G" is no size; write a number and one of B, kB, MB, ...
    """
    match = re.fullmatch(r"([0-9]{1,24}(?:\.[0-9]{1,24})?) ?([A-Za-z]+)", text.strip())
    unit = _BYTES.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise CompareError(f'"{text}" is no size; write a number and one of {", ".join(UNITS)}, as in 2GB')
    size = round(Fraction(match[1]) * unit)
    if size < 1:
        raise CompareError(f'"{text}" is less than one byte; write a larger size, such as 2GB')
    return size
