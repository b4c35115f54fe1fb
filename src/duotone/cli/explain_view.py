"""What `duotone explain` shows: what stands out first, then modules, operations, casts and saved bytes as tables."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from duotone.torch.explanation.explanation import OUTSIDE, Cast, Explanation
from duotone.torch.explanation.plain_text import header
from duotone.torch.explanation.siblings import Siblings, casts_of_groups, group_siblings
from duotone.torch.explanation.wording import count, label, labels, size

_MOST = 12
_MOST_OPERATIONS = 20
_FLOATING = ("float64", "float32", "bfloat16", "float16")


def show(explanation: Explanation, task: str, console: Console, depth: int | None = None) -> None:
    """Print an explanation.

    Args:
        explanation: of the task's model.
        task: its name.
        console: of any width from 80 on.
        depth: how many names a module's path may have; what is inside the last ones counts as theirs.
    """
    console.print(Text.assemble((f"{task}: ", "bold"), header(explanation)))
    _title(console, "What stands out")
    for finding in explanation.findings:
        item = Table.grid(padding=(0, 1))
        item.add_row(Text("-"), Text(finding))
        console.print(item)
    _title(console, "Modules", "dtypes, and what each saves for the backward pass")
    console.print(_modules_table(explanation, depth))
    _title(console, "Operations", "how often each computes in which dtype")
    console.print(_operations_table(explanation))
    _title(console, "Casts", "by the policy (duotone), the model's code, or torch inside an operation")
    _casts(explanation, console)
    _title(console, "Saved for the backward pass", "each storage once")
    if explanation.saved_activation_bytes or explanation.saved_parameter_bytes:
        console.print(_saved_table(explanation))
    else:
        console.print("nothing")


def _title(console: Console, text: str, what: str = "") -> None:
    console.print()
    console.print(Text.assemble((text, "bold"), f": {what}" if what else ""))


def _table(*headings: str, right: Iterable[str] = ()) -> Table:
    # the padding that lets all columns stand within 80 characters
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table


@dataclass
class _Row:
    """A row of the table of modules; what it saved includes the modules inside that are not shown."""

    name: str
    group: Siblings
    saved: dict[str, int]


def _modules_table(explanation: Explanation, depth: int | None) -> Table:
    rows = list(_module_rows(explanation, depth))
    saved = [each for each in _dtypes(explanation.saved_activation_bytes) if each in _FLOATING]
    headings = [f"saved\n{label(dtype)}" for dtype in saved]
    # indices and masks, in one column
    others = any(_other(each) for each in (explanation.saved_activation_bytes, explanation.saved_outside_bytes))
    headings += ["saved\nother"] if others else []
    table = _table("module", "type", "params", "input", "output", *headings, right=headings)
    if others:
        # several dtypes stand below each other, so that names of modules keep their room
        table.columns[3].max_width = table.columns[4].max_width = 6
    for row in rows:
        first = row.group.first
        sizes = _saved_cells(row.saved, saved, others)
        dtypes = (first.parameter_dtypes, first.input_dtypes, first.output_dtypes)
        table.add_row(row.name, first.type, *(labels(each) for each in dtypes), *sizes)
    if explanation.saved_outside_bytes:
        table.add_row(OUTSIDE, "", "", "", "", *_saved_cells(explanation.saved_outside_bytes, saved, others))
    return table


def _saved_cells(found: Mapping[str, int], dtypes: Iterable[str], others: bool) -> list[str]:
    cells = [size(found[dtype]) if dtype in found else "" for dtype in dtypes]
    other = _other(found)
    return cells + ([size(other) if other else ""] if others else [])


def _other(found: Mapping[str, int]) -> int:
    """Return the bytes that are no floating-point numbers."""
    return sum(number for dtype, number in found.items() if dtype not in _FLOATING)


def _module_rows(explanation: Explanation, depth: int | None) -> Iterator[_Row]:
    """Yield what is shown of modules that ran or hold parameters, indented under the one around them."""
    row: _Row | None = None
    around: list[Siblings] = []
    for group in group_siblings(explanation.modules):
        if row is not None and depth is not None and group.depth > depth:
            for dtype, number in group.saved_bytes.items():
                row.saved[dtype] = row.saved.get(dtype, 0) + number
            continue
        if row is not None:
            yield row
            row = None
        while around and around[-1].depth >= group.depth:
            around.pop()
        first = group.first
        if group.depth == 0 or first.calls or first.parameter_dtypes or first.saved_bytes:
            row = _Row(_module_name(group, around), group, group.saved_bytes)
            around.append(group)
    if row is not None:
        yield row


def _module_name(group: Siblings, around: list[Siblings]) -> str:
    if not around:
        return "the model"
    inside = group.path.removeprefix(around[-1].path).lstrip(".")
    alike = len(group.members) // len(around[-1].members)
    calls = f" called {group.first.calls}x" if group.first.calls > 1 else ""
    return "  " * (len(around) - 1) + inside + (f" ({alike})" if alike > 1 else "") + calls


def _operations_table(explanation: Explanation) -> Table:
    calls: defaultdict[str, dict[str, int]] = defaultdict(dict)
    results: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for each in explanation.operations:
        calls[each.name][each.compute_dtype] = calls[each.name].get(each.compute_dtype, 0) + each.calls
        results[each.name][each.output_dtype] = None
    dtypes = _dtypes(each.compute_dtype for each in explanation.operations)
    headings = [label(dtype) for dtype in dtypes]
    table = _table("operation", *headings, "results in", right=headings)
    ordered = sorted(calls.items(), key=lambda item: -sum(item[1].values()))
    for name, by_dtype in ordered[:_MOST_OPERATIONS]:
        numbers = [f"{by_dtype[dtype]:,}" if dtype in by_dtype else "" for dtype in dtypes]
        table.add_row(name, *numbers, labels(results[name]))
    if len(ordered) > _MOST_OPERATIONS:
        table.add_row(f"{len(ordered) - _MOST_OPERATIONS} more with --json")
    return table


def _casts(explanation: Explanation, console: Console) -> None:
    casts = casts_of_groups(explanation)
    if not casts:
        console.print("none")
        return
    table = _table("from", "to", "calls", "written", "by", "for", "module and line", right=("calls", "written"))
    # the longest names of operations fold, so that the last column keeps its place
    table.columns[5].max_width = 14
    for cast in casts[:_MOST]:
        table.add_row(
            label(cast.from_dtype),
            label(cast.to_dtype),
            f"{cast.calls:,}",
            size(cast.result_bytes),
            cast.by,
            cast.operation or _border(cast),
            f"{cast.module or 'the model'} {(cast.place or '').rpartition('/')[2]}",
        )
    console.print(table)
    total = f"{count(sum(cast.calls for cast in casts), 'cast')}, {size(sum(cast.result_bytes for cast in casts))}"
    console.print(f"in all {total} written{_rest(len(casts))}")


def _rest(rows: int) -> str:
    return f"; {count(rows - _MOST, 'row')} more with --json" if rows > _MOST else ""


def _border(cast: Cast) -> str:
    """Say what is cast where a module's inputs or results pass into another dtype."""
    if cast.module:
        return "border"
    return "result" if cast.to_dtype == "float32" else "input"


def _saved_table(explanation: Explanation) -> Table:
    activations, resident = explanation.saved_activation_bytes, explanation.saved_parameter_bytes
    dtypes = _dtypes([*activations, *resident])
    headings = [label(dtype) for dtype in dtypes]
    table = _table("", *headings, "together", right=(*headings, "together"))
    for name, saved in (("activations", activations), ("parameters and buffers, there anyway", resident)):
        if not saved:
            continue
        sizes = [size(saved[dtype]) if dtype in saved else "" for dtype in dtypes]
        table.add_row(name, *sizes, size(sum(saved.values())))
    return table


def _dtypes(found: Iterable[str]) -> list[str]:
    """Return dtypes once each, floating-point ones first, the widest of them first."""
    once = set(found)
    return [dtype for dtype in _FLOATING if dtype in once] + sorted(once.difference(_FLOATING))
