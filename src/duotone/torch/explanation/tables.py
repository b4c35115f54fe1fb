"""The tables of an explanation, as rows and columns: as text in `print`, and as the command line draws them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from duotone.torch.explanation.module_groups import ModuleGroup, casts_of_groups, group_modules
from duotone.torch.explanation.records import OUTSIDE, Cast, ModuleDtypes, Operation, SavedForBackward
from duotone.torch.explanation.wording import count, label, labels, size

_MOST_CASTS = 12
_MOST_OPERATIONS = 20
_FLOATING = ("float64", "float32", "bfloat16", "float16")
# what is no number in floating point, indices and masks, in one column
_OTHER = "other"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: its heading, of one line or two.
        is_number: whether it holds figures, which stand on the right.
        width: from which on a terminal folds it; None to leave that to the terminal.
    """

    heading: str
    is_number: bool = False
    width: int | None = None


@dataclass(frozen=True)
class Table:
    """A table with its title. `str()` gives it as text, with columns as wide as what is in them.

    Attributes:
        title: what it is of.
        about: what its figures are.
        columns: its columns.
        rows: a cell for each column.
        total: a line below it, or "".
        rows_left_out: how many rows it would have beyond those.
    """

    title: str
    about: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    total: str = ""
    rows_left_out: int = 0

    def footer(self, where: str) -> str:
        """Return the line below the table: the total, and how many rows are left out and where they are."""
        left_out = f"{count(self.rows_left_out, 'row')} more {where}" if self.rows_left_out else ""
        return "; ".join(filter(None, ("" if self.rows else "none", self.total, left_out)))

    def __str__(self) -> str:
        lines = ["", f"{self.title}: {self.about}"]
        if self.rows:
            headings = [column.heading.rpartition("\n") for column in self.columns]
            cells = [tuple(first for first, _, _ in headings), tuple(last for _, _, last in headings), *self.rows]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            for row in cells:
                padded = (
                    cell.rjust(width) if column.is_number else cell.ljust(width)
                    for cell, width, column in zip(row, widths, self.columns, strict=True)
                )
                lines += ["  ".join(padded).rstrip()] if any(row) else []
        return "\n".join([*lines, *filter(None, [self.footer("in to_json()")])])


def modules_table(modules: Sequence[ModuleDtypes], saved: SavedForBackward, depth: int | None = None) -> Table:
    """Return the table of modules that ran or hold parameters, indented under the one around them.

    Args:
        modules: all of them; those that are alike and stand side by side are one row.
        saved: what all of them saved.
        depth: how many names a module's path may have; what is inside the last ones counts as theirs.
    """
    dtypes = _ordered(dtype if dtype in _FLOATING else _OTHER for dtype in saved.activation_bytes)
    # where room is scarce, several dtypes stand below each other, so that names of modules keep theirs
    width = 6 if _OTHER in dtypes else None
    texts = (Column("module"), Column("type"), Column("params"), Column("input", width=width))
    rows = []
    for name, module, saved_bytes in _module_rows(modules, depth):
        text = [labels(each) for each in (module.parameter_dtypes, module.input_dtypes, module.output_dtypes)]
        rows.append((name, module.type, *text, *_sizes(saved_bytes, dtypes)))
    if saved.outside_bytes:
        rows.append((OUTSIDE, "", "", "", "", *_sizes(saved.outside_bytes, dtypes)))
    return Table(
        "Modules",
        "dtypes, and what each saves for the backward pass",
        (*texts, Column("output", width=width), *(Column(f"saved\n{label(dtype)}", True) for dtype in dtypes)),
        tuple(rows),
    )


def operations_table(operations: Sequence[Operation]) -> Table:
    """Return the table of operations by name, the most called first."""
    calls: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    results: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for each in operations:
        calls[each.name][each.compute_dtype] += each.calls
        results[each.name][each.output_dtype] = None
    dtypes = _ordered(each.compute_dtype for each in operations)
    rows = [
        (name, *(f"{by_dtype[dtype]:,}" if dtype in by_dtype else "" for dtype in dtypes), labels(results[name]))
        for name, by_dtype in sorted(calls.items(), key=lambda item: -sum(item[1].values()))
    ]
    return Table(
        "Operations",
        "how often each computes in which dtype",
        (Column("operation"), *(Column(label(dtype), True) for dtype in dtypes), Column("results in")),
        tuple(rows[:_MOST_OPERATIONS]),
        rows_left_out=max(0, len(rows) - _MOST_OPERATIONS),
    )


def casts_table(casts: Sequence[Cast], modules: Sequence[ModuleDtypes]) -> Table:
    """Return the table of casts, the largest first; those of modules that are alike are added up."""
    grouped = casts_of_groups(casts, modules)
    rows = [
        (
            label(cast.from_dtype),
            label(cast.to_dtype),
            f"{cast.calls:,}",
            size(cast.result_bytes),
            cast.by,
            cast.operation or _border(cast),
            f"{cast.module or 'the model'} {(cast.source_line or '').rpartition('/')[2]}",
        )
        for cast in grouped[:_MOST_CASTS]
    ]
    total = f"{count(sum(cast.calls for cast in casts), 'cast')}, {size(sum(cast.result_bytes for cast in casts))}"
    columns = Column("from"), Column("to"), Column("calls", True), Column("written", True), Column("by")
    return Table(
        "Casts",
        "by the policy (duotone), the model's code, or torch inside an operation",
        # the longest names of operations fold, so that the last column keeps its room
        (*columns, Column("for", width=14), Column("module and line")),
        tuple(rows),
        f"in all {total} written" if casts else "",
        max(0, len(grouped) - _MOST_CASTS),
    )


def saved_table(saved: SavedForBackward) -> Table:
    """Return the table of what is saved for the backward pass."""
    dtypes = _ordered([*saved.activation_bytes, *saved.parameter_bytes])
    named = ("activations", saved.activation_bytes), ("parameters and buffers, there anyway", saved.parameter_bytes)
    return Table(
        "Saved for the backward pass",
        "each storage once",
        (Column(""), *(Column(label(dtype), True) for dtype in dtypes), Column("together", True)),
        tuple((name, *_sizes(sizes, dtypes), size(sum(sizes.values()))) for name, sizes in named if sizes),
    )


def _module_rows(
    modules: Sequence[ModuleDtypes], depth: int | None
) -> Iterator[tuple[str, ModuleDtypes, Mapping[str, int]]]:
    """Yield a name for each row, one of the modules that it is about, and what all of them saved."""
    groups = group_modules(modules)
    saved_bytes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for group in groups:
        saved_bytes[".".join(group.path.split(".")[:depth])] += group.saved_bytes()
    parents: list[ModuleGroup] = []
    for group in groups:
        while parents and parents[-1].depth >= group.depth:
            parents.pop()
        first, is_shown = group.first, depth is None or group.depth <= depth
        if is_shown and (group.depth == 0 or first.calls or first.parameter_dtypes or saved_bytes[group.path]):
            yield _module_name(group, parents), first, saved_bytes[group.path]
            parents.append(group)


def _module_name(group: ModuleGroup, parents: Sequence[ModuleGroup]) -> str:
    if not parents:
        return "the model"
    inside = group.path.removeprefix(parents[-1].path).lstrip(".")
    alike = len(group.members) // len(parents[-1].members)
    calls = f" called {group.first.calls}x" if group.first.calls > 1 else ""
    return "  " * (len(parents) - 1) + inside + (f" ({alike})" if alike > 1 else "") + calls


def _border(cast: Cast) -> str:
    """Say what is cast where a module's inputs or results pass into another dtype."""
    if cast.module:
        return "border"
    return "result" if cast.to_dtype == "float32" else "input"


def _sizes(saved_bytes: Mapping[str, int], dtypes: Sequence[str]) -> list[str]:
    """Return a cell for each dtype, empty where nothing of it was saved."""
    other = sum(number for dtype, number in saved_bytes.items() if dtype not in _FLOATING)
    by_dtype = {**saved_bytes, **({_OTHER: other} if other else {})}
    return [size(by_dtype[dtype]) if dtype in by_dtype else "" for dtype in dtypes]


def _ordered(dtypes: Iterable[str]) -> list[str]:
    """Return dtypes once each, floating-point ones first, the widest of them first."""
    once = set(dtypes)
    return [dtype for dtype in _FLOATING if dtype in once] + sorted(once.difference(_FLOATING))
