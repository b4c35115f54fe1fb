"""What `explain` returns: everything that was seen, what stands out of it, and both as JSON, tables and text."""

import json
from dataclasses import asdict, dataclass

from duotone.jax.explanation.records import Output, Residual, Scope
from duotone.jax.explanation.tables import residuals_table, scopes_table
from duotone.wording.groups import in_groups, paths_of_groups
from duotone.wording.page import as_html, as_text
from duotone.wording.records import Cast, Operation, SavedForBackward
from duotone.wording.tables import Table, casts_table, operations_table, saved_table
from duotone.wording.words import count


@dataclass(frozen=True, repr=False)
class Explanation:
    """Where precision is in a function. It shows itself as text, and in a notebook as tables that unfold; `findings`
    is what to read first.

    Attributes:
        function: its name.
        policy: the policy that it runs under, or None.
        findings: what stands out, a sentence each: what was seen, how much, what to do.
        scopes: every named scope, in the order in which they are entered.
        operations: every primitive that computed with floating-point numbers, the most called first.
        casts: between floating-point dtypes, the largest first.
        outputs: results that a last cast brought into their dtype.
        residuals: what is saved for the backward pass, the largest first.
        saved_for_backward: the same in bytes by dtype.
    """

    function: str
    policy: str | None
    findings: tuple[str, ...]
    scopes: tuple[Scope, ...]
    operations: tuple[Operation, ...]
    casts: tuple[Cast, ...]
    outputs: tuple[Output, ...]
    residuals: tuple[Residual, ...]
    saved_for_backward: SavedForBackward

    def to_json(self) -> str:
        """Return everything as a JSON object with the attributes' names.

        >>> import jax.numpy as jnp
        >>> from duotone.jax.explanation import explain
        >>> json.loads(explain(jnp.sin, jnp.ones(2)).to_json())["operations"][0]["name"]
        'sin'
        """
        return json.dumps(asdict(self), indent=2)

    def header(self) -> str:
        """Return in one line what was explained."""
        under = f"under {self.policy}" if self.policy else "under no policy"
        calls = count(sum(each.calls for each in self.operations), "floating-point equation")
        return f"{self.function} {under}, {calls}, traced and not run"

    def tables(self, depth: int | None = None) -> tuple[Table, ...]:
        """Return what text shows below the findings: scopes, primitives, casts, what is saved.

        Args:
            depth: how many names a scope's path may have; what is inside the last ones counts as theirs.
        """
        paths = paths_of_groups(self.scopes)
        casts = in_groups(self.casts, "module", paths)
        by = "by the policy (duotone) or the code (model)"
        return (
            scopes_table(self.scopes, self.saved_for_backward, depth),
            operations_table(self.operations),
            casts_table(casts, by, "scope and line", "no scope"),
            saved_table(self.saved_for_backward, ("activations and inputs", "weights, there anyway")),
            residuals_table(in_groups(self.residuals, "scope", paths)),
        )

    def __str__(self) -> str:
        return as_text(self.header(), self.findings, self.tables())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self.header(), self.findings, self.tables())
