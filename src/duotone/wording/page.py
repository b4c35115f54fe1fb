"""A whole explanation on one page, as text and as HTML: what it is of, what stands out, and the tables."""

from collections.abc import Iterable

from duotone.wording.notebook import block, bullets, folded, paragraph
from duotone.wording.notebook import table as html_table
from duotone.wording.tables import Table


def as_text(header: str, findings: Iterable[str], tables: Iterable[Table]) -> str:
    """Return an explanation as text.

    >>> print(as_text("f under bf16", ["nothing"], []))
    f under bf16
    <BLANKLINE>
    What stands out
    - nothing
    """
    listed = (f"- {finding}" for finding in findings)
    return "\n".join([header, "", "What stands out", *listed, *map(str, tables)])


def as_html(header: str, findings: Iterable[str], tables: Iterable[Table]) -> str:
    """Return an explanation as HTML, whose tables a click unfolds."""
    folds = (
        folded(
            f"{table.title}: {table.about}",
            html_table([(column.heading, column.is_number) for column in table.columns], table.rows),
            paragraph(table.footer("in to_json()")),
        )
        for table in tables
    )
    return block(header, bullets(findings), *folds)
