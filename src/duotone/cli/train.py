"""`duotone train`: train a built-in task or the user's own under a policy."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from duotone.cli.settings_flags import with_settings
from duotone.errors import TaskError, nearest_names

if TYPE_CHECKING:
    from duotone.train import Group, RunFolder, RunSettings, Task, Trainer

RESUMES = ("latest", "latest-valid")
_RUNS = Path("runs")


class TrainCommand(TyperCommand):
    """A command whose `--resume` may go without its value, which Typer cannot say."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, with the value of a `--resume` written out."""
        try:
            return super().parse_args(ctx, with_resume_value(args))
        except Exception as error:
            # all ranks read the same arguments, and the first says what is wrong with them
            if os.environ.get("RANK", "0") != "0":
                raise SystemExit(getattr(error, "exit_code", 2)) from error
            raise


def with_resume_value(arguments: Sequence[str]) -> list[str]:
    """Join `--resume` and the word after it if that is a value of it, and give it its default if not.

    >>> with_resume_value(["digits", "--resume", "--out", "run"])
    ['digits', '--resume=latest', '--out', 'run']
    >>> with_resume_value(["--resume", "latest-valid", "digits"])
    ['--resume=latest-valid', 'digits']
    """
    left, joined = list(arguments), []
    while left:
        argument = left.pop(0)
        if argument == "--resume":
            argument += f"={left.pop(0) if left and left[0] in RESUMES else RESUMES[0]}"
        joined.append(argument)
    return joined


@with_settings()
def train_command(
    given: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", metavar="", help="Print all settings as YAML and exit.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. (default: runs/TASK-POLICY-N)")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Resume the run in --out from its newest checkpoint, or from its newest intact one.",
            metavar="[latest|latest-valid]",
        ),
    ] = None,
    stop_after: Annotated[int | None, typer.Option(help="Stop after this step, saved; --resume goes on.")] = None,
) -> None:
    """Train a task under a policy: metrics, checkpoints, and a summary at the end."""
    from duotone.cli.one_voice import one_voice
    from duotone.train import open_ranks

    with open_ranks() as ranks, one_voice(ranks):
        if stop_after is not None and stop_after < 1:
            raise TaskError(f"--stop-after is {stop_after}; it must be at least 1")
        if resume is not None and resume not in RESUMES:
            raise TaskError(f'--resume is "{resume}"; {nearest_names(resume, RESUMES)}')
        if resume and out is None:
            raise TaskError("--resume needs --out, the folder of the run to go on with")
        chosen, settings = _open_task(given, config, out if resume else None, ranks)
        if print_config:
            ranks.first(lambda: typer.echo(settings.to_yaml(), nl=False))
            return
        _run(_open_trainer(chosen, settings, out, resume, ranks), stop_after)


def _open_trainer(
    task: "Task", settings: "RunSettings", out: Path | None, resume: str | None, ranks: "Group"
) -> "Trainer":
    from duotone.train import RunFolder, Trainer, next_free_folder

    folder = RunFolder(ranks.first(lambda: out or next_free_folder(_RUNS, settings)))
    ranks.first(lambda: folder.check_same_run(settings) if resume else folder.check_free())
    trainer = Trainer(task, settings, folder, ranks)
    if not resume:
        ranks.first(lambda: folder.start(settings))
    elif ranks.first(folder.checkpoints):
        trainer.resume("latest" if resume == "latest" else "latest-valid")
    else:
        ranks.first(lambda: folder.cut_metrics(0))
        ranks.first(lambda: typer.echo(f"{folder.path} ended before its first checkpoint; starting again from step 0"))
    return trainer


def _open_task(
    given: dict[str, Any], config: Path | None, resumed: Path | None, ranks: "Group"
) -> "tuple[Task, RunSettings]":
    import random

    import numpy as np
    import torch

    from duotone.train import RunFolder, find_task, read_config, resolve_settings

    def read() -> dict[str, Any]:
        own = RunFolder(resumed).settings() if resumed is not None else {}
        if ranks.size == 1:
            # how several ranks shared the run's model does not bind a single one
            own.pop("parallel", None)
        return own | (read_config(config) if config is not None else {}) | given

    values = ranks.first(read)
    # settings that the task does not decide are checked before its data are read
    early = resolve_settings(values)
    ranks.mode(early.parallel)
    # a task may draw from any of them, and a run that starts again must draw the same
    random.seed(early.seed)
    np.random.seed(early.seed % 2**32)
    torch.manual_seed(early.seed)
    task = ranks.agree(lambda: find_task(early.task))
    return task, resolve_settings(dict(task.settings), values)


def _run(trainer: "Trainer", stop_after: int | None) -> None:
    from duotone.train.run_folder import step_of

    folder, ranks = trainer.folder, trainer.ranks
    assert folder is not None
    if trainer.step == trainer.settings.steps:
        summary = ranks.first(folder.summary)
        if summary is not None:
            ranks.first(lambda: typer.echo(_finished(trainer, folder, summary)))
            return
    try:
        _train(trainer, folder, stop_after)
    except KeyboardInterrupt:
        # other ranks may be at any point, so nothing is exchanged with them
        if ranks.rank == 0:
            saved = folder.checkpoints()
            since = f"since step {step_of(saved[0])}" if saved else "yet"
            typer.echo(f"stopped at once, nothing was saved {since}; go on with: {_command(folder, ranks)}")
        raise typer.Exit(130) from None


def _train(trainer: "Trainer", folder: "RunFolder", stop_after: int | None) -> None:
    from rich.console import Console

    from duotone.cli.train_view import open_view
    from duotone.train import as_json, print_at_once, stop_on_signal

    ranks = trainer.ranks
    silent = Console(quiet=True, force_terminal=False) if ranks.rank else None
    tell = print_at_once if ranks.rank == 0 else _keep_quiet
    with open_view(trainer, silent) as view, stop_on_signal(trainer.stop, tell) as interruption:
        for metrics in trainer.run(stop_after):
            view.show(metrics)
    if interruption.cause is not None or trainer.step < trainer.settings.steps:
        by = "" if interruption.cause is None else f" by {interruption.cause.name}"
        line = (
            f"stopped{by} after step {trainer.step} of {trainer.settings.steps}, saved; "
            f"go on with: {_command(folder, ranks)}"
        )
        ranks.first(lambda: typer.echo(line))
        raise typer.Exit(interruption.exit_code)
    summary = trainer.summary()
    ranks.first(lambda: folder.write_summary(as_json(summary)))
    view.summarise(summary, folder.path)


def _finished(trainer: "Trainer", folder: "RunFolder", summary: Mapping[str, Any]) -> str:
    from duotone.cli.train_view import quality_name

    quality = summary.get("evaluation", {}).get(trainer.task.quality)
    figure = "" if quality is None else f", {quality_name(trainer.task)} {quality:.4f}"
    return f"{folder.path} is finished at step {trainer.step}{figure}; there is nothing left to do"


def _command(folder: "RunFolder", ranks: "Group") -> str:
    start = "duotone train" if ranks.size == 1 else f"torchrun --nproc-per-node {ranks.size} -m duotone train"
    return f"{start} --resume --out {shlex.quote(str(folder.path))}"


def _keep_quiet(_: str) -> None:
    """Tell nothing: another rank does."""
