"""What was seen of a run of torch alone, as values: modules, widenings, repeated casts, results.

Dtypes are named as torch names them, bytes are whole numbers, a module is named by its path in the model (`""` is the
model itself, and `OUTSIDE` is whatever ran outside of it, a loss for instance), and a source line is `file:line`.
"""

from dataclasses import dataclass, replace

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

    def traits(self) -> "ModuleDtypes":
        """Return everything in which alike modules are the same: all but their paths and what they saved."""
        return replace(self, path="", saved_bytes={}, kept_float32_bytes=0)


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
