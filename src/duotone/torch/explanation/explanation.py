"""What `explain` returns: everything that was seen, what stands out of it, and both as JSON, tables and text."""

import json
from dataclasses import asdict, dataclass

from duotone.torch.explanation.records import ModuleDtypes, Output, RepeatedCast, Widening
from duotone.torch.explanation.tables import modules_table
from duotone.wording.groups import in_groups, paths_of_groups
from duotone.wording.page import as_html, as_text
from duotone.wording.records import Cast, Operation, SavedForBackward
from duotone.wording.tables import Table, casts_table, operations_table, saved_table
from duotone.wording.words import count


@dataclass(frozen=True, repr=False)
class Explanation:
    """Where precision is in a model. It shows itself as text, and in a notebook as tables that unfold; `findings` is
    what to read first.

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
        saved_for_backward: what autograd saved, in bytes by dtype.
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
    saved_for_backward: SavedForBackward

    def to_json(self) -> str:
        """Return everything as a JSON object with the attributes' names.

        >>> import torch
        >>> from duotone.torch.explanation import explain
        >>> json.loads(explain(torch.nn.ReLU(), torch.ones(2)).to_json())["operations"][0]["name"]
        'relu'
        """
        return json.dumps(asdict(self), indent=2)

    def header(self) -> str:
        """Return in one line what was explained."""
        under = f"under {self.policy}" if self.policy else "under no policy"
        compiled = ", as written: compilation is left out" if self.compiled else ""
        ran = count(sum(module.calls > 0 for module in self.modules), "module")
        return f"{self.model} {under}, one forward pass of {ran}{compiled}"

    def tables(self, depth: int | None = None) -> tuple[Table, ...]:
        """Return what text and terminal show below the findings: modules, operations, casts, saved bytes.

        Args:
            depth: how many names a module's path may have; what is inside the last ones counts as theirs.
        """
        casts = in_groups(self.casts, "module", paths_of_groups(self.modules))
        by = "by the policy (duotone), the model's code, or torch inside an operation"
        return (
            modules_table(self.modules, self.saved_for_backward, depth),
            operations_table(self.operations),
            casts_table(casts, by, "module and line", "the model"),
            saved_table(self.saved_for_backward, ("activations", "parameters and buffers, there anyway")),
        )

    def __str__(self) -> str:
        return as_text(self.header(), self.findings, self.tables())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self.header(), self.findings, self.tables())
