"""Names of arms as labels that fit into a chart."""


def shortened(name: str, letters: int) -> str:
    """Return a name with its middle left out where it is longer than so many letters: ends tell arms apart.

    >>> shortened("bf16,layers.*.attention=fp32", 15)
    'bf16,la…on=fp32'
    """
    if len(name) <= letters:
        return name
    kept = letters - 1
    return f"{name[: (kept + 1) // 2]}…{name[len(name) - kept // 2 :]}"
