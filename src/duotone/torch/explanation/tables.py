"""The table of modules: as rows and columns, indented, those that are alike as one."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from duotone.torch.explanation.records import OUTSIDE, ModuleDtypes
from duotone.wording.groups import Group, groups_of
from duotone.wording.records import SavedForBackward
from duotone.wording.tables import OTHER, Column, Table, saved_columns, sizes
from duotone.wording.words import label, labels


def modules_table(modules: Sequence[ModuleDtypes], saved: SavedForBackward, depth: int | None = None) -> Table:
    """Return the table of modules that ran or hold parameters, indented under the one around them.

    Args:
        modules: all of them; those that are alike and stand side by side are one row.
        saved: what all of them saved.
        depth: how many names a module's path may have; what is inside the last ones counts as theirs.
    """
    dtypes = saved_columns(saved.activation_bytes)
    # where room is scarce, several dtypes stand below each other, so that names of modules keep theirs
    width = 6 if OTHER in dtypes else None
    texts = (Column("module"), Column("type"), Column("params"), Column("input", width=width))
    rows = []
    for name, module, saved_bytes in _module_rows(modules, depth):
        text = [labels(each) for each in (module.parameter_dtypes, module.input_dtypes, module.output_dtypes)]
        rows.append((name, module.type, *text, *sizes(saved_bytes, dtypes)))
    if saved.outside_bytes:
        rows.append((OUTSIDE, "", "", "", "", *sizes(saved.outside_bytes, dtypes)))
    return Table(
        "Modules",
        "dtypes, and what each saves for the backward pass",
        (*texts, Column("output", width=width), *(Column(f"saved\n{label(dtype)}", True) for dtype in dtypes)),
        tuple(rows),
    )


def _module_rows(
    modules: Sequence[ModuleDtypes], depth: int | None
) -> Iterator[tuple[str, ModuleDtypes, Mapping[str, int]]]:
    """Yield a name for each row, one of the modules that it is about, and what all of them saved."""
    groups = groups_of(modules)
    saved_bytes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for group in groups:
        saved_bytes[".".join(group.path.split(".")[:depth])] += group.saved_bytes()
    parents: list[Group[ModuleDtypes]] = []
    for group in groups:
        while parents and parents[-1].depth >= group.depth:
            parents.pop()
        first, is_shown = group.first, depth is None or group.depth <= depth
        if is_shown and (group.depth == 0 or first.calls or first.parameter_dtypes or saved_bytes[group.path]):
            yield _module_name(group, parents), first, saved_bytes[group.path]
            parents.append(group)


def _module_name(group: Group[ModuleDtypes], parents: Sequence[Group[ModuleDtypes]]) -> str:
    if not parents:
        return "the model"
    inside = group.path.removeprefix(parents[-1].path).lstrip(".")
    alike = len(group.members) // len(parents[-1].members)
    calls = f" called {group.first.calls}x" if group.first.calls > 1 else ""
    return "  " * (len(parents) - 1) + inside + (f" ({alike})" if alike > 1 else "") + calls
