"""An explanation as plain text: what `print` shows, without any library."""

from collections.abc import Iterator, Sequence

from duotone.torch.explanation.explanation import Explanation, Operation
from duotone.torch.explanation.siblings import casts_of_groups, group_siblings
from duotone.torch.explanation.wording import count, label, labels, size, sizes

_MOST = 12


def plain_text(explanation: Explanation) -> str:
    """Return the findings, then modules, operations, casts and saved bytes, each as aligned columns."""
    return "\n".join(_lines(explanation))


def header(explanation: Explanation) -> str:
    """Return in one line what was explained."""
    under = f"under {explanation.policy}" if explanation.policy else "under no policy"
    compiled = ", as written: compilation is left out" if explanation.compiled else ""
    ran = count(sum(module.calls > 0 for module in explanation.modules), "module")
    return f"{explanation.model} {under}, one forward pass of {ran}{compiled}"


def computed_in(operation: Operation) -> str:
    """Return the dtype that an operation computed in, and whether torch widened some of its operands to it."""
    return label(operation.compute_dtype) + (" (mixed)" if operation.mixed else "")


def _lines(explanation: Explanation) -> Iterator[str]:
    yield header(explanation)
    yield from (f"- {finding}" for finding in explanation.findings)
    rows = [
        (
            "  " * group.depth + (group.path.rpartition(".")[2] or "(model)"),
            f"{group.first.type}{f' x{len(group.members)}' if len(group.members) > 1 else ''}",
            labels(group.first.parameter_dtypes),
            f"{labels(group.first.input_dtypes)} -> {labels(group.first.output_dtypes)}",
            sizes(group.saved_bytes),
        )
        for group in group_siblings(explanation.modules)
    ]
    yield from _table(("module", "type", "parameters", "in -> out", "saved for backward"), rows)
    rows = [
        (each.name, computed_in(each), label(each.output_dtype), str(each.calls))
        for each in explanation.operations[:_MOST]
    ]
    yield from _table(("operation", "computed in", "result in", "calls"), rows)
    yield from _rest(len(explanation.operations), "operation")
    casts = casts_of_groups(explanation)
    rows = [
        (
            f"{label(each.from_dtype)} -> {label(each.to_dtype)}",
            str(each.calls),
            size(each.result_bytes),
            each.by,
            each.operation or "a module's border",
            each.module or "(model)",
            each.place or "-",
        )
        for each in casts[:_MOST]
    ]
    yield from _table(("cast", "calls", "written", "by", "for", "in", "at"), rows)
    yield from _rest(len(casts), "cast")
    yield ""
    yield f"saved for backward: {sizes(explanation.saved_activation_bytes)}"
    yield f"parameters and buffers among what is saved: {sizes(explanation.saved_parameter_bytes)}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        return
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    yield ""
    for row in (headings, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _rest(number: int, noun: str) -> Iterator[str]:
    if number > _MOST:
        yield f"and {count(number - _MOST, noun)} more"
