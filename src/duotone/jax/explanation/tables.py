"""The tables of named scopes and of residuals."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from duotone.jax.explanation.records import Residual, Scope
from duotone.wording.groups import groups_of
from duotone.wording.records import SavedForBackward
from duotone.wording.tables import Column, Table, saved_columns, sizes
from duotone.wording.words import count, label, labels, size

_MOST = 12


def scopes_table(scopes: Sequence[Scope], saved: SavedForBackward, depth: int | None = None) -> Table:
    """Return the table of named scopes, indented under the one around them.

    Args:
        scopes: all of them.
        saved: what is saved in all.
        depth: how many names a path may have; what is inside the last ones counts as theirs.
    """
    dtypes = saved_columns(saved.activation_bytes)
    counts, computes, saved_bytes = Counter[str](), defaultdict[str, dict[str, None]](dict), defaultdict(Counter[str])
    alike: dict[str, int] = {}
    for group in groups_of(scopes):
        shown = ".".join(group.path.split(".")[:depth])
        # the first of a path is the scope itself
        alike.setdefault(shown, len(group.members))
        counts[shown] += sum(each.equations for each in group.members)
        computes[shown].update(dict.fromkeys(group.first.compute_dtypes))
        saved_bytes[shown] += group.saved_bytes()
    rows = []
    for path in filter(None, alike):
        around, _, name = path.rpartition(".")
        number = alike[path] // alike.get(around, 1)
        figures = f"{counts[path]:,}" if counts[path] else "", labels(computes[path]), *sizes(saved_bytes[path], dtypes)
        rows.append(("  " * path.count(".") + name + (f" ({number})" if number > 1 else ""), *figures))
    if saved.outside_bytes:
        rows.append(("outside every scope", "", "", *sizes(saved.outside_bytes, dtypes)))
    columns = Column("scope"), Column("equations", True), Column("compute in")
    return Table(
        "Scopes",
        "what computes in them, and what each saves for the backward pass",
        (*columns, *(Column(f"saved\n{label(dtype)}", True) for dtype in dtypes)),
        tuple(rows),
    )


def residuals_table(residuals: Sequence[Residual]) -> Table:
    """Return the table of what is saved for the backward pass, the largest first."""
    rows = [
        (
            f"{label(each.dtype)}[{','.join(map(str, each.shape))}]",
            f"{each.calls:,}",
            size(each.result_bytes),
            each.origin,
            f"{each.scope or 'no scope'} {(each.source_line or '').rpartition('/')[2]}",
        )
        for each in residuals[:_MOST]
    ]
    total = count(sum(each.calls for each in residuals), "array"), size(sum(each.result_bytes for each in residuals))
    columns = Column("array"), Column("times", True), Column("bytes", True), Column("made by", width=24)
    return Table(
        "Residuals",
        "the arrays that are saved for the backward pass",
        (*columns, Column("scope and line")),
        tuple(rows),
        f"in all {', '.join(total)}" if residuals else "",
        max(0, len(residuals) - _MOST),
    )
