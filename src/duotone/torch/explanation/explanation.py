"""What `explain` found, as values: modules, operations, casts, saved bytes, and sentences.

Dtypes are named as torch names them, bytes are whole numbers, and a module is named by its path in the model: `""` is
the model itself, and `OUTSIDE` is whatever ran around it, a loss for instance.
"""

import json
from dataclasses import asdict, dataclass

OUTSIDE = "outside the model"
NO_HALF = "no FP16 on this CPU"


@dataclass(frozen=True)
class ModuleDtypes:
    """One module: what went in, what came out.

    Attributes:
        path: its path; a module at several places has its first.
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
        compute_dtype: the widest that its kernels read; what a kernel widens to inside does not show.
        output_dtype: of its result.
        calls: how many.
        mixed: whether an elementwise kernel read several dtypes, so that torch widened the result.
        modules: the calls by path of the innermost module around them.
        places: the lines that made the calls, `file:line`.
        reason: why it computed in FP32, if that is known: `"keep_float32"`, `"no FP16 on this CPU"` for products that
            Duotone carries out in FP32 there, `"torch"` if its operands were narrow and torch widened them inside.
    """

    name: str
    compute_dtype: str
    output_dtype: str
    calls: int
    mixed: bool
    modules: dict[str, int]
    places: tuple[str, ...]
    reason: str | None = None


@dataclass(frozen=True)
class Widening:
    """An elementwise operation on a 16-bit and an FP32 tensor, which gave FP32 although nothing asked for it.

    Attributes:
        operation: its name.
        module: the innermost module around it.
        place: `file:line` of the code that called it.
        from_dtype: the 16-bit operand's.
        name: of the parameter or buffer that the FP32 operand is, or is a part of.
        is_buffer: whether that is a buffer.
        is_stream: whether both operands have the result's size.
        calls: how often.
        result_bytes: the results' size, together.
    """

    operation: str
    module: str
    place: str | None
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
        place: `file:line` of the code that called the operation or the module.
        calls: how many casts.
        result_bytes: what they wrote, together.
    """

    from_dtype: str
    to_dtype: str
    by: str
    module: str
    operation: str | None
    place: str | None
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
        modules: where.
        places: the lines that caused them.
    """

    from_dtype: str
    to_dtype: str
    shape: tuple[int, ...]
    name: str | None
    times: int
    wasted_bytes: int
    modules: tuple[str, ...]
    places: tuple[str, ...]


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
class Explanation:
    """Where precision is in a model. `str()` gives it as text, `findings` is what to read first.

    Attributes:
        model: the model's class.
        policy: the policy that it was cast to, or None.
        compiled: whether it, or a part, is compiled; what is explained is the model as written.
        findings: what stands out, a sentence each: what was seen, how much, what to do.
        modules: every module, in the model's order.
        operations: every operation that read or made floating-point numbers, the most called first.
        casts: between floating-point dtypes, the largest first.
        emulated_casts: those around FP16 products on a CPU that has none, which are nowhere else; not among `casts`.
        repeated_casts: of the same tensor to the same dtype, the most wasteful first.
        widenings: operations on a 16-bit and an FP32 tensor that gave FP32, in the order in which they first ran.
        outputs: what the model returned.
        saved_activation_bytes: what autograd saved for the backward pass by dtype, each storage once, without
            parameters and buffers.
        saved_parameter_bytes: the parameters and buffers that it saved; they exist anyway.
        saved_outside_bytes: the part of `saved_activation_bytes` that was saved outside of every module.
    """

    model: str
    policy: str | None
    compiled: bool
    findings: tuple[str, ...]
    modules: tuple[ModuleDtypes, ...]
    operations: tuple[Operation, ...]
    casts: tuple[Cast, ...]
    emulated_casts: tuple[Cast, ...]
    repeated_casts: tuple[RepeatedCast, ...]
    widenings: tuple[Widening, ...]
    outputs: tuple[Output, ...]
    saved_activation_bytes: dict[str, int]
    saved_parameter_bytes: dict[str, int]
    saved_outside_bytes: dict[str, int]

    def to_json(self) -> str:
        """Return everything as a JSON object with the attributes' names.

        >>> import torch
        >>> from duotone.torch.explanation import explain
        >>> json.loads(explain(torch.nn.ReLU(), torch.ones(2)).to_json())["operations"][0]["name"]
        'relu'
        """
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        from duotone.torch.explanation.plain_text import plain_text

        return plain_text(self)
