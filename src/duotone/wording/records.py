"""What was seen of a program, as values that every framework's `explain` returns: operations, casts, saved bytes.

Dtypes are named as `formats` names them, bytes are whole numbers, a source line is `file:line`. A module is named by
its path: in torch that of the module in the model, in JAX the named scopes; `""` is the model itself, or no scope.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from duotone.wording.words import count, size


@dataclass(frozen=True)
class Operation:
    """Calls of one operation in one dtype.

    Attributes:
        name: as in torch: `linear`, `softmax`, `add`; in JAX the primitive, `dot_general`.
        kind: its kind in the table of operations, `"compute"` for a product; None if it is not listed there.
        compute_dtype: the widest that its kernels read; what a kernel widens to inside does not show.
        output_dtype: of its result.
        calls: how many.
        mixed: whether an elementwise kernel read several dtypes, so that torch widened the result.
        modules: the calls by path of the innermost module around them.
        source_lines: that made the calls.
        reason: why it computed in FP32, if that is known: `"keep_float32"`, `"no FP16 on this CPU"` for products that
            Duotone carries out in FP32 there, `"torch"` if its operands were narrow and torch widened them inside; in
            JAX what of the call asked for it, such as `precision="highest"`.
    """

    name: str
    kind: str | None
    compute_dtype: str
    output_dtype: str
    calls: int
    mixed: bool
    modules: dict[str, int]
    source_lines: tuple[str, ...]
    reason: str | None = None


@dataclass(frozen=True)
class Cast:
    """Copies of floating-point tensors into another dtype, from one line of code in one module.

    Attributes:
        from_dtype: what was read.
        to_dtype: what was written.
        by: `"duotone"` if the policy inserted it, `"model"` if code asked for it, `"autocast"` if a torch.autocast
            around an uncast model did, `"torch"` if an operation of torch's does it inside.
        module: the innermost module around it.
        operation: what it was done for: `linear` for the operand of one, `to` or `float` for a cast by itself; None
            where a module's input or result is cast.
        source_line: of the code that called the operation or the module.
        calls: how many casts.
        result_bytes: what they wrote, together.
    """

    from_dtype: str
    to_dtype: str
    by: str
    module: str
    operation: str | None
    source_line: str | None
    calls: int
    result_bytes: int


@dataclass(frozen=True)
class SavedForBackward:
    """What is saved for the backward pass, in bytes by dtype, each storage once.

    Attributes:
        activation_bytes: of everything but parameters and buffers, the model's inputs included.
        parameter_bytes: of parameters and buffers; they exist anyway.
        outside_bytes: the part of `activation_bytes` that was saved outside of every module.
    """

    activation_bytes: dict[str, int]
    parameter_bytes: dict[str, int]
    outside_bytes: dict[str, int]

    @property
    def total_activation_bytes(self) -> int:
        """The sum of `activation_bytes`."""
        return sum(self.activation_bytes.values())


# frozen dataclasses with `calls` and `result_bytes`
Summed = TypeVar("Summed")
Key = TypeVar("Key")
Value = TypeVar("Value")


def add_up(records: Iterable[Summed]) -> list[Summed]:
    """Put records together that differ in nothing but calls and bytes, in the order of the first of each.

    >>> casts = [Cast("float32", "bfloat16", "model", path, "to", None, 1, 8) for path in ("a", "b", "a")]
    >>> [(cast.module, cast.calls, cast.result_bytes) for cast in add_up(casts)]
    [('a', 2, 16), ('b', 1, 8)]
    """
    sums: dict[Any, Any] = {}
    each: Any
    for each in records:
        key = replace(each, calls=0, result_bytes=0)
        before = sums.get(key, key)
        sums[key] = replace(
            before, calls=before.calls + each.calls, result_bytes=before.result_bytes + each.result_bytes
        )
    return list(sums.values())


def largest_first(casts: Iterable[Cast]) -> tuple[Cast, ...]:
    """Return casts added up, those that wrote most first."""
    return tuple(sorted(add_up(casts), key=lambda cast: -cast.result_bytes))


def amount(casts: Iterable[Cast]) -> tuple[str, str]:
    """Return how many casts there are, and what they wrote, in words."""
    casts = list(casts)
    return count(sum(cast.calls for cast in casts), "cast"), size(sum(cast.result_bytes for cast in casts))


def largest(
    groups: Mapping[Key, list[Value]], weigh: Callable[[Value], int], most: int = 3
) -> list[tuple[Key, list[Value]]]:
    """Return the groups that weigh most together, in this order.

    >>> largest({"a": [1], "b": [1, 2], "c": [0]}, abs, most=2)
    [('b', [1, 2]), ('a', [1])]
    """
    return sorted(groups.items(), key=lambda item: -sum(map(weigh, item[1])))[:most]
