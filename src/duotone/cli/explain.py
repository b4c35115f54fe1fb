"""The verb `explain`: the precision of a task's model under a policy.

One batch goes through the model and its loss, forward only; nothing is trained and nothing is written.
"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from duotone.cli.settings_flags import with_settings
from duotone.cli.values import whole_number
from duotone.errors import TaskError

if TYPE_CHECKING:
    import torch

    from duotone.torch.explanation import Explanation
    from duotone.train import RunSettings, Task


@with_settings("task", "policy", "seed", "device")
def explain_command(
    given: dict[str, Any],
    modules: Annotated[
        int | None,
        typer.Option(
            metavar="DEPTH", help="How deep to show modules: 2 shows blocks.0. (default: all)", parser=whole_number
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print everything as JSON, nothing left out.")
    ] = False,
) -> None:
    """Show the precision of a task's model: dtypes, casts, bytes saved for backward, and what stands out."""
    import torch

    from duotone.train import find_device, find_task, guarded, resolve_settings

    if modules is not None and modules < 0:
        raise TaskError(f"--modules is {modules}; it must be at least 0")
    # whatever the task does not decide is checked before its data are read
    early = resolve_settings(given)
    find_device(early.device)
    torch.manual_seed(early.seed)
    task = guarded(find_task(early.task))
    settings = resolve_settings(dict(task.settings), given)
    explanation = _explain(task, settings, find_device(settings.device))
    if as_json:
        typer.echo(explanation.to_json())
        return
    from duotone.cli.explain_view import show
    from duotone.cli.output import Output

    show(explanation, task.name, Output(), depth=modules)


def _explain(task: "Task", settings: "RunSettings", device: "torch.device") -> "Explanation":
    import torch

    import duotone.torch as dt
    from duotone.torch.explanation import explain
    from duotone.train.task import on_device

    model = dt.cast(task.model.to(device), settings.policy)
    # the first batch of a run with this seed, as the trainer draws it
    generator = torch.Generator().manual_seed(settings.seed * 2**32)
    batch = next(iter(task.batches(generator)), None)
    if batch is None:
        raise TaskError(f"the data set of task {task.name!r} is empty: an epoch yields no batch")
    batch = on_device(batch, device)
    return explain(model, run=lambda: task.loss(model, batch))
