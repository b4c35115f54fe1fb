"""What autocast knows of each value of a program, beside its shape and the dtype that it was traced in.

HALF   in the policy's 16-bit format
OPEN   FP32 that no FP32 rule has touched, a weight for instance: where it meets 16 bits, the result has 16
HELD   FP32 that stays: what FP32 rules give, and data; what meets it is widened
OTHER  as it was traced: integers, FP64, FP8, complex numbers, keys, the other 16-bit format

OPEN < HALF < HELD is the order in which what meets in one place (a carry, two branches) is joined.
"""

import enum
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from duotone.jax import internals

FLOAT32 = jnp.dtype("float32")


class Kind(enum.IntEnum):
    """How a value is kept; see the module."""

    OPEN = 0
    HALF = 1
    HELD = 2
    OTHER = 3


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of one value.

    Attributes:
        kind: how it is kept.
        number: the number that all its elements are, if that is written in the program.
        narrow: of OPEN ones: every element is a 16-bit number, as those of a 16-bit weight are.
        is_start: of OPEN ones: a sum starts with it, see `sums`.
    """

    kind: Kind
    number: float | None = None
    narrow: bool = False
    is_start: bool = False

    @property
    def without_number(self) -> "Value":
        """What is known of it where it is given to a program as an array."""
        return replace(self, number=None)


OPEN, HALF, HELD, OTHER = (Value(kind) for kind in (Kind.OPEN, Kind.HALF, Kind.HELD, Kind.OTHER))
BIT = Value(Kind.OPEN, narrow=True)
START = Value(Kind.OPEN, is_start=True)


def is_float(traced: Any, compute: Any) -> bool:
    """Return whether values of a type are cast at all: those traced in FP32 or in the policy's 16-bit format."""
    return internals.is_array_type(traced) and traced.dtype in (FLOAT32, compute)


def dtype_of(value: Value, traced: Any, compute: Any) -> Any:
    """Return the dtype that a value has while the program runs."""
    if value.kind is Kind.OTHER:
        return traced.dtype
    return compute if value.kind is Kind.HALF else FLOAT32


def joined(first: Value, second: Value) -> Value:
    """Return what a value is that may be the one or the other.

    >>> joined(OPEN, HALF) == HALF, joined(HELD, HALF) == HELD
    (True, True)
    """
    if first == second:
        return first
    if first.kind is second.kind:
        is_start = first.is_start and second.is_start
        return Value(first.kind, narrow=first.narrow and second.narrow, is_start=is_start)
    kind = max(first.kind, second.kind)
    # what is known of the number no longer holds
    return Value(kind)
