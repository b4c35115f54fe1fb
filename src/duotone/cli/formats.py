"""The verb `formats`: every number format with its range, precision, memory, use and risks, from `duotone.formats`."""

import dataclasses
import json
import math
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from duotone.cli.output import Output
from duotone.formats import FORMATS, Format


def formats_command(
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print every property as JSON, keyed by name.")
    ] = False,
) -> None:
    """Show the number formats: range, precision, memory, use in training, and risks."""
    if as_json:
        rows = {format.name: _properties(format) for format in FORMATS.values()}
        typer.echo(json.dumps(rows, indent=2, allow_nan=False))
        return
    console = Output()
    console.print(_numbers_table())
    console.print("bits: sign+exponent+significand; digits: decimal; memory: FP32 is 1", style="dim")
    console.print()
    console.print(_use_table())


def _numbers_table() -> Table:
    """Return the table of what each format holds."""
    # the padding that lets all columns stand within 80 characters
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("format", no_wrap=True)
    for heading in ("bits", "max", "smallest\nnormal", "smallest\nsubnormal", "epsilon", "digits", "memory"):
        table.add_column(heading, justify="right", overflow="fold")
    for format in FORMATS.values():
        subnormal = format.smallest_subnormal
        table.add_row(
            format.label,
            f"{int(format.signed)}+{format.exponent_bits}+{format.stored_bits}",
            _short(format.max),
            _short(format.smallest_normal),
            "none" if subnormal is None else _short(subnormal),
            _short(format.epsilon),
            f"{format.decimal_digits:.1f}",
            f"{format.memory_against_float32:g}",
        )
    return table


def _use_table() -> Table:
    """Return the table of what each format is used for in training, and what may go wrong."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_lines=True)
    table.add_column("format", no_wrap=True)
    table.add_column("in mixed precision training")
    table.add_column("underflow and overflow")
    for format in FORMATS.values():
        table.add_row(format.label, format.role, format.range_risk)
    return table


def _short(number: float) -> str:
    """Return a power of two as `2^-14`, and any other number in at most five digits."""
    fraction, exponent = math.frexp(number)
    return f"2^{exponent - 1}" if fraction == 0.5 else f"{number:.5g}"


def _properties(format: Format) -> dict[str, object]:
    """Return the fields of a format and everything computed from them."""
    computed = [name for name, member in vars(Format).items() if isinstance(member, property)]
    return dataclasses.asdict(format) | {name: getattr(format, name) for name in computed}
