"""The blocks of code in a page of Markdown, by where they stand."""

import re


def code_blocks(page: str, text: str, language: str) -> list[tuple[str, str]]:
    """Return every block of a language in the text of a page: page and line, and the code."""
    found = re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [(f"{page}:{text.count(chr(10), 0, match.start()) + 2}", match[1]) for match in found]
