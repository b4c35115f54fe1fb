"""How results show themselves in a notebook: small HTML of headings, lists and tables, without script or colours.

Text has the colours of the page around it, light or dark, and lines are half transparent. Whatever is given is text:
it is escaped.
"""

from collections.abc import Iterable, Sequence
from html import escape

_BLOCK = "font-size:0.9em;line-height:1.35;text-align:left"
_CELL = "padding:0.1em 0.8em 0.1em 0;border-bottom:1px solid rgba(128,128,128,0.35);vertical-align:top"


def block(title: str, *parts: str) -> str:
    """Return one result as HTML.

    Args:
        title: what it is, as text.
        parts: what follows, as HTML.

    >>> print(block("x < y"))
    <div style="..."><strong>x &lt; y</strong></div>
    """
    return f'<div style="{_BLOCK}"><strong>{escape(title)}</strong>{"".join(parts)}</div>'


def folded(summary: str, *parts: str) -> str:
    """Return HTML that a click unfolds, under a summary of text."""
    return f'<details><summary style="cursor:pointer">{escape(summary)}</summary>{"".join(parts)}</details>'


def paragraph(text: str) -> str:
    """Return a paragraph of text as HTML; "" for none."""
    return f'<p style="margin:0.3em 0">{escape(text)}</p>' if text else ""


def bullets(items: Iterable[str]) -> str:
    """Return a list of texts as HTML; "" for none."""
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<ul style="margin:0.3em 0">{listed}</ul>' if listed else ""


def table(headings: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts as HTML.

    Args:
        headings: of each column, and whether it holds figures, which stand on the right. Line breaks are kept, and
            spaces at the beginning of a cell, which show what is inside of what.
        rows: a cell for each column.
    """
    aligned = [f"{_CELL};text-align:{'right' if is_number else 'left'}" for _, is_number in headings]
    texts = (escape(text).replace("\n", "<br>") for text, _ in headings)
    head = "".join(f'<th style="{style}">{text}</th>' for style, text in zip(aligned, texts, strict=True))
    body = "".join(f"<tr>{_cells(aligned, row)}</tr>" for row in rows)
    return (
        '<table style="border-collapse:collapse;font-size:inherit;margin:0.3em 0"><thead>'
        f"<tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cells(aligned: Sequence[str], row: Sequence[str]) -> str:
    return "".join(f'<td style="{style}">{_cell(text)}</td>' for style, text in zip(aligned, row, strict=True))


def _cell(text: str) -> str:
    inner = text.lstrip(" ")
    return "&nbsp;&nbsp;" * (len(text) - len(inner)) + escape(inner)
