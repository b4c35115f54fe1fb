"""How dtypes, sizes, counts and places are written in sentences and tables."""

from collections.abc import Iterable

_LABELS = {"float64": "FP64", "float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
SIXTEEN_BITS = ("bfloat16", "float16")


def label(dtype: str) -> str:
    """Return a dtype as people write it.

    >>> label("bfloat16"), label("int64")
    ('BF16', 'int64')
    """
    return _LABELS.get(dtype, dtype)


def labels(dtypes: Iterable[str]) -> str:
    """Return several dtypes, or a dash for none.

    >>> labels(["float32", "bfloat16"]), labels([])
    ('FP32, BF16', '-')
    """
    return ", ".join(map(label, dtypes)) or "-"


def size(number: int) -> str:
    """Return a number of bytes in the unit that suits it, decimal.

    >>> size(512), size(412_000_000), size(1_234)
    ('512 B', '412 MB', '1.23 kB')
    """
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= step:
            value = number / step
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{number} B"


def count(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural.

    >>> count(1, "cast"), count(3, "cast"), count(2, "matrix product")
    ('1 cast', '3 casts', '2 matrix products')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_few(items: Iterable[str], most: int = 3) -> str:
    """Return the first few of several things, and how many more there are.

    >>> first_few(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    unique = list(dict.fromkeys(items))
    rest = f" and {len(unique) - most} more" if len(unique) > most else ""
    return ", ".join(unique[:most]) + rest


def at(source_lines: Iterable[str | None]) -> str:
    """Return where something is in the code, the first two lines, as the end of a phrase; "" if it is not known.

    >>> at(["model.py:7", None, "model.py:7"]), at([None])
    (' at model.py:7', '')
    """
    text = first_few((line for line in source_lines if line is not None), most=2)
    return f" at {text}" if text else ""
