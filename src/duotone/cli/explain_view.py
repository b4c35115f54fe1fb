"""What `duotone explain` shows: what stands out first, then modules, operations, casts and saved bytes as tables."""

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from duotone.torch.explanation import Explanation
from duotone.wording.tables import Table


def show(explanation: Explanation, task: str, console: Console, depth: int | None = None) -> None:
    """Print an explanation.

    Args:
        explanation: of the task's model.
        task: its name.
        console: of any width from 80 on.
        depth: how many names a module's path may have; what is inside the last ones counts as theirs.
    """
    console.print(Text.assemble((f"{task}: ", "bold"), explanation.header()))
    console.print(Text("\nWhat stands out", "bold"))
    for finding in explanation.findings:
        item = RichTable.grid(padding=(0, 1))
        item.add_row(Text("-"), Text(finding))
        console.print(item)
    for table in explanation.tables(depth):
        console.print(Text.assemble((f"\n{table.title}", "bold"), f": {table.about}"))
        if table.rows:
            console.print(_drawn(table))
        if footer := table.footer("with --json"):
            console.print(footer)


def _drawn(table: Table) -> RichTable:
    # the padding that lets all columns stand within 80 characters
    drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns:
        justify = "right" if column.is_number else "left"
        drawn.add_column(column.heading, justify=justify, overflow="fold", max_width=column.width)
    for row in table.rows:
        # text, since a path may hold what looks like markup
        drawn.add_row(*map(Text, row))
    return drawn
