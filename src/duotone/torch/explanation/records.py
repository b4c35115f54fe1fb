"""What was seen of a run, as values: modules, operations, casts, results, saved bytes.

Dtypes are named as torch names them, bytes are whole numbers, a module is named by its path in the model (`""` is the
model itself, and `OUTSIDE` is whatever ran outside of it, a loss for instance), and a source line is `file:line`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

OUTSIDE = "outside the model"
NO_HALF = "no FP16 on this CPU"


@dataclass(frozen=True)
class ModuleDtypes:
    """One module: what went in, what came out.

    Attributes:
        path: its path; a module that has several has its first.
        type: its class.
        calls: how often it ran; a container that only holds others never does.
        policy: the policy that it is under, or None.
        parameter_dtypes: of its own parameters, without those of modules inside it.
        input_dtypes: of the tensors that it was called with, before a cast model casts them.
        output_dtypes: of the tensors that it returned.
        saved_bytes: activations saved for backward while it was the innermost module, by dtype; a storage belongs to
            whoever saved it first.
        kept_float32_bytes: the part of its FP32 that was saved inside of `keep_float32`, or inside of FP16 products on
            a CPU that has none.
    """

    path: str
    type: str
    calls: int
    policy: str | None
    parameter_dtypes: tuple[str, ...]
    input_dtypes: tuple[str, ...]
    output_dtypes: tuple[str, ...]
    saved_bytes: dict[str, int]
    kept_float32_bytes: int = 0


@dataclass(frozen=True)
class Operation:
    """Calls of one operation in one dtype.

    Attributes:
        name: as in torch: `linear`, `softmax`, `add`.
        kind: its kind in the table of operations, `"compute"` for a product; None if it is not listed there.
        compute_dtype: the widest that its kernels read; what a kernel widens to inside does not show.
        output_dtype: of its result.
        calls: how many.
        mixed: whether an elementwise kernel read several dtypes, so that torch widened the result.
        modules: the calls by path of the innermost module around them.
        source_lines: that made the calls.
        reason: why it computed in FP32, if that is known: `"keep_float32"`, `"no FP16 on this CPU"` for products that
            Duotone carries out in FP32 there, `"torch"` if its operands were narrow and torch widened them inside.
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
class Widening:
    """An elementwise operation on a 16-bit and an FP32 tensor, which gave FP32 although nothing asked for it.

    Attributes:
        operation: its name.
        module: the innermost module around it.
        source_line: of the code that called it.
        from_dtype: the 16-bit operand's.
        name: of the parameter or buffer that the FP32 operand is, or is a part of.
        is_buffer: whether that is a buffer.
        is_stream: whether both operands have the result's size.
        calls: how often.
        result_bytes: the results' size, together.
    """

    operation: str
    module: str
    source_line: str | None
    from_dtype: str
    name: str | None
    is_buffer: bool
    is_stream: bool
    calls: int
    result_bytes: int


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
class RepeatedCast:
    """One unchanged tensor that was cast to the same dtype more than once.

    Attributes:
        from_dtype: the tensor's.
        to_dtype: what it was cast to.
        shape: the tensor's.
        name: of the parameter or buffer, if it is one.
        times: how many casts.
        wasted_bytes: what all of them but the first wrote.
        modules: paths of the modules that cast it.
        source_lines: that caused the casts.
    """

    from_dtype: str
    to_dtype: str
    shape: tuple[int, ...]
    name: str | None
    times: int
    wasted_bytes: int
    modules: tuple[str, ...]
    source_lines: tuple[str, ...]


@dataclass(frozen=True)
class Output:
    """One tensor that the model returned.

    Attributes:
        dtype: in which it left.
        computed_dtype: in which it was before a last cast; the same without one.
        shape: its shape.
        result_bytes: its size.
        rounded_in: the module at whose border it was cast from FP32 to `computed_dtype`, if that was all that made it.
    """

    dtype: str
    computed_dtype: str
    shape: tuple[int, ...]
    result_bytes: int
    rounded_in: str | None = None


@dataclass(frozen=True)
class SavedForBackward:
    """What autograd saved for the backward pass, in bytes by dtype, each storage once.

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


Summed = TypeVar("Summed", Cast, Widening)


def add_up(records: Iterable[Summed]) -> list[Summed]:
    """Put records together that differ in nothing but calls and bytes, in the order of the first of each.

    >>> casts = [Cast("float32", "bfloat16", "model", path, "to", None, 1, 8) for path in ("a", "b", "a")]
    >>> [(cast.module, cast.calls, cast.result_bytes) for cast in add_up(casts)]
    [('a', 2, 16), ('b', 1, 8)]
    """
    sums: dict[Summed, Summed] = {}
    for record in records:
        key = replace(record, calls=0, result_bytes=0)
        before = sums.get(key, key)
        sums[key] = replace(
            before, calls=before.calls + record.calls, result_bytes=before.result_bytes + record.result_bytes
        )
    return list(sums.values())


def largest_first(casts: Iterable[Cast]) -> tuple[Cast, ...]:
    """Return casts added up, those that wrote most first."""
    return tuple(sorted(add_up(casts), key=lambda cast: -cast.result_bytes))
