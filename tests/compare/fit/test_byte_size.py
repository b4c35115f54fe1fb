"""Sizes in bytes as people write them."""

import re

import pytest

from duotone.compare.fit.byte_size import UNITS, parse_size
from duotone.errors import CompareError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        (" 2 GB ", 2 * 10**9),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("0.1GB", 10**8),
        ("0.3kB", 300),
        ("0.0005KiB", 1),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("100B", 100),
        ("123456789012345678901B", 123456789012345678901),
    ],
)
def test_a_size_is_exact(text, size):
    assert parse_size(text) == size


def test_every_unit_that_the_message_names_is_read():
    sizes = [parse_size(f"1{unit}") for unit in UNITS]
    assert sizes == [1000**power for power in range(5)] + [1024**power for power in range(1, 5)]


@pytest.mark.parametrize(
    "text",
    ["", "2", "GB", "2G", "2Gi", "-1GB", "+1GB", "1,5GB", "1e3MB", "1.GB", ".5GB", "2 G B", "2PB", "nanGB"],
)
def test_what_is_no_size_is_refused(text):
    message = f'"{text}" is no size; write a number and one of B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, as in 2GB'
    with pytest.raises(CompareError, match=f"^{re.escape(message)}$"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0GB", "0.0MB", "0.4B"])
def test_less_than_a_byte_is_refused(text):
    with pytest.raises(CompareError, match="is less than one byte"):
        parse_size(text)
