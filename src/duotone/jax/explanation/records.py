"""What was seen of a program of JAX alone, as values: named scopes and residuals.

A scope is named by its names with dots between them, as rules of a policy name them; `""` is none.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Scope:
    """One named scope: what was computed in it.

    Attributes:
        path: its names.
        equations: how many that make or read floating-point numbers, without those of scopes inside it.
        compute_dtypes: in which they computed.
        saved_bytes: activations saved for backward that were made in it, by dtype.
    """

    path: str
    equations: int
    compute_dtypes: tuple[str, ...]
    saved_bytes: dict[str, int]

    def traits(self) -> "Scope":
        """Return everything in which alike scopes are the same: all but their paths and what they saved."""
        return replace(self, path="", saved_bytes={})


@dataclass(frozen=True)
class Residual:
    """Arrays saved for the backward pass that are of one kind.

    Attributes:
        dtype: of the arrays.
        shape: of each.
        origin: the primitive that made them, `name "x"` if `checkpoint_name` names them, `argument params.kernel` if
            they are one, `cast of` any of these.
        scope: in which they were made.
        source_line: of the code that made them.
        calls: how many there are.
        result_bytes: their size, together.
    """

    dtype: str
    shape: tuple[int, ...]
    origin: str
    scope: str
    source_line: str | None
    calls: int
    result_bytes: int


@dataclass(frozen=True)
class Output:
    """An array that the function returned in another dtype than it was computed in.

    Attributes:
        dtype: in which it left.
        computed_dtype: in which it was before a last cast.
        shape: its shape.
        result_bytes: its size.
    """

    dtype: str
    computed_dtype: str
    shape: tuple[int, ...]
    result_bytes: int
