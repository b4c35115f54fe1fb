"""`duotone ops`: which operations run in which dtype inside a cast model, on every device."""

import json
from difflib import get_close_matches
from typing import Annotated

import typer
from rich.markup import escape
from rich.padding import Padding

from duotone.cli.output import Output
from duotone.errors import OperationError
from duotone.operations import MEANINGS


def ops_command(
    operation: Annotated[
        str | None, typer.Argument(help="One operation, such as softmax or linalg.norm.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print each operation's kind as JSON.")] = False,
) -> None:
    """Show which operations run in which dtype inside a cast model."""
    from duotone.torch.casting.operation_table import functions_named, kinds_by_name

    kinds: dict[str, str] = dict(kinds_by_name())
    if operation is not None:
        name = operation
        for prefix in ("torch.", "nn.functional.", "F.", "Tensor."):
            name = name.removeprefix(prefix)
        # what every object of Python has is no operation
        if name not in kinds and (name.startswith("__") or not any(functions_named(name))):
            near = get_close_matches(name.removeprefix("nn.").lower(), kinds, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else "write a name such as softmax or linalg.norm"
            raise OperationError(f'torch has no operation "{operation}"; {hint}')
        kinds = {name: kinds.get(name, "as_given")}
    if as_json:
        typer.echo(json.dumps(kinds, indent=2))
        return
    console = Output()
    for kind, meaning in MEANINGS.items():
        names = [name for name, its in kinds.items() if its == kind]
        if names or (kind == "as_given" and operation is None):
            console.print(f"[bold]{kind}[/bold]: {meaning}")
        for line in _by_namespace(names):
            console.print(Padding(escape(line), (0, 0, 0, 2)))
        if names and operation is None:
            console.print()


def _by_namespace(names: list[str]) -> list[str]:
    """Return a line of names without a namespace, and one for each namespace."""
    lines: dict[str, list[str]] = {}
    for name in names:
        namespace, _, inner = name.rpartition(".")
        lines.setdefault(namespace, []).append(inner)
    return [" ".join([f"{namespace}:"] * bool(namespace) + inner) for namespace, inner in lines.items()]
