"""The tables of an explanation, as rows and columns: as text in `print`, and as the command line draws them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from duotone.wording.records import Cast, Operation, SavedForBackward, amount
from duotone.wording.words import count, label, labels, size

# what is no number in floating point, indices and masks, in one column
OTHER = "other"
_MOST_CASTS = 12
_MOST_OPERATIONS = 20
_FLOATING = ("float64", "float32", "bfloat16", "float16")


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


def casts_table(casts: Sequence[Cast], about: str, place: str, outermost: str) -> Table:
    """Return the table of casts.

    Args:
        casts: the largest first, those of modules that are alike added up.
        about: who makes casts.
        place: what the last column names.
        outermost: the module whose path is "".
    """
    rows = [
        (
            label(cast.from_dtype),
            label(cast.to_dtype),
            f"{cast.calls:,}",
            size(cast.result_bytes),
            cast.by,
            cast.operation or _border(cast),
            f"{cast.module or outermost} {(cast.source_line or '').rpartition('/')[2]}",
        )
        for cast in casts[:_MOST_CASTS]
    ]
    columns = Column("from"), Column("to"), Column("calls", True), Column("written", True), Column("by")
    return Table(
        "Casts",
        about,
        # the longest names of operations fold, so that the last column keeps its room
        (*columns, Column("for", width=14), Column(place)),
        tuple(rows),
        f"in all {', '.join(amount(casts))} written" if casts else "",
        max(0, len(casts) - _MOST_CASTS),
    )


def saved_table(saved: SavedForBackward, names: tuple[str, str]) -> Table:
    """Return the table of what is saved for the backward pass, its two rows by name."""
    dtypes = _ordered([*saved.activation_bytes, *saved.parameter_bytes])
    named = zip(names, (saved.activation_bytes, saved.parameter_bytes), strict=True)
    return Table(
        "Saved for the backward pass",
        "each storage once",
        (Column(""), *(Column(label(dtype), True) for dtype in dtypes), Column("together", True)),
        tuple((name, *sizes(each, dtypes), size(sum(each.values()))) for name, each in named if each),
    )


def saved_columns(dtypes: Iterable[str]) -> list[str]:
    """Return a column for each floating-point dtype, and one for all others."""
    return _ordered(dtype if dtype in _FLOATING else OTHER for dtype in dtypes)


def sizes(saved_bytes: Mapping[str, int], dtypes: Sequence[str]) -> list[str]:
    """Return a cell for each dtype, empty where nothing of it was saved."""
    other = sum(number for dtype, number in saved_bytes.items() if dtype not in _FLOATING)
    by_dtype = {**saved_bytes, **({OTHER: other} if other else {})}
    return [size(by_dtype[dtype]) if dtype in by_dtype else "" for dtype in dtypes]


def _border(cast: Cast) -> str:
    """Say what is cast where a module's inputs or results pass into another dtype."""
    if cast.module:
        return "border"
    return "result" if cast.to_dtype == "float32" else "input"


def _ordered(dtypes: Iterable[str]) -> list[str]:
    """Return dtypes once each, floating-point ones first, the widest of them first."""
    once = set(dtypes)
    return [dtype for dtype in _FLOATING if dtype in once] + sorted(once.difference(_FLOATING))
