"""`duotone train`: train a built-in task or the user's own under a policy."""

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duotone.cli.commands import Verb
from duotone.cli.settings_flags import with_settings
from duotone.cli.values import path_value, whole_number
from duotone.errors import NonFiniteLoss, TaskError, nearest_names

if TYPE_CHECKING:
    from duotone.train import Group, RunFolder, RunSettings, Task, Trainer

RESUMES = ("latest", "latest-valid")
_RUNS = Path("runs")


class TrainCommand(Verb):
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
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of settings.", parser=path_value, metavar="FILE")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", metavar="", help="Print all settings as YAML and exit.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run. (default: runs/TASK-POLICY-N)", parser=path_value, metavar="FOLDER"),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Resume the run in --out from its newest checkpoint, or from its newest intact one.",
            metavar="[latest|latest-valid]",
        ),
    ] = None,
    stop_after: Annotated[
        int | None,
        typer.Option(help="Stop after this step, saved; --resume goes on.", parser=whole_number, metavar="int"),
    ] = None,
) -> None:
    """Train a task under a policy: metrics, checkpoints, and a summary at the end."""
    from duotone.cli.one_voice import one_voice
    from duotone.train import open_ranks

    with open_ranks() as ranks, one_voice(ranks), ExitStack() as held:
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
        _run(_open_trainer(chosen, settings, out, resume, ranks, held), stop_after)


def _open_trainer(
    task: "Task", settings: "RunSettings", out: Path | None, resume: str | None, ranks: "Group", held: ExitStack
) -> "Trainer":
    from duotone.train import RunFolder, Trainer, held_folder

    def hold() -> Path:
        if out is not None and resume:
            RunFolder(out).check_same_run(settings)
        elif out is not None:
            RunFolder(out).check_free()
        return held.enter_context(held_folder(out, _RUNS, settings)).path

    folder = RunFolder(ranks.first(hold))
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

    from duotone.train import RunFolder, find_task, guarded, read_config, resolve_settings, with_warmup

    def read() -> tuple[dict[str, Any], dict[str, Any]]:
        before = RunFolder(resumed).settings() if resumed is not None else {}
        if ranks.size == 1:
            # how several ranks shared the run's model does not bind a single one
            before.pop("parallel", None)
        return before, (read_config(config) if config is not None else {}) | given

    before, own = ranks.first(read)
    values = before | own
    # settings that the task does not decide are checked before its data are read
    early = resolve_settings(values)
    ranks.mode(early.parallel)
    # a task may draw from any of them, and a run that starts again must draw the same
    random.seed(early.seed)
    np.random.seed(early.seed % 2**32)
    torch.manual_seed(early.seed)
    task = ranks.agree(lambda: guarded(find_task(early.task)))
    settings = resolve_settings(dict(task.settings), values)
    # a run that was begun keeps what it was begun with
    return task, settings if before else with_warmup(settings, own)


def _run(trainer: "Trainer", stop_after: int | None) -> None:
    from duotone.train.run_folder import step_of

    folder, ranks = trainer.folder, trainer.ranks
    assert folder is not None
    if trainer.step == trainer.settings.steps:
        summary = ranks.first(folder.summary)
        if summary is not None:
            line, quality = _finished(trainer, folder, summary)
            ranks.first(lambda: typer.echo(line))
            _check_finite(trainer, quality)
            return
    try:
        _train(trainer, folder, stop_after)
    except KeyboardInterrupt:
        # other ranks may be at any point, so nothing is exchanged with them
        if ranks.rank == 0:
            saved = folder.checkpoints()
            since = f"since step {step_of(saved[0])}" if saved else "yet"
            _tell(f"stopped at once, nothing was saved {since}; go on with: {_command(folder, ranks)}")
        raise typer.Exit(130) from None


def _train(trainer: "Trainer", folder: "RunFolder", stop_after: int | None) -> None:
    from duotone.cli.output import Output
    from duotone.cli.train_view import open_view
    from duotone.train import as_json, print_at_once, stop_on_signal

    ranks = trainer.ranks
    silent = Output(quiet=True, force_terminal=False) if ranks.rank else None
    tell = print_at_once if ranks.rank == 0 else _keep_quiet
    unprinted: OSError | None = None
    with stop_on_signal(trainer.stop, tell) as interruption, ExitStack() as views:
        view = views.enter_context(open_view(trainer, silent))
        for metrics in trainer.run(stop_after):
            try:
                view.show(metrics)
            except OSError as error:
                # a run that nobody can read of ends as one that is stopped, with this step saved
                unprinted = error
                trainer.stop()
        unprinted = _closed(views) or unprinted
    if interruption.cause is not None or trainer.step < trainer.settings.steps:
        by = "" if interruption.cause is None else f" by {interruption.cause.name}"
        line = (
            f"stopped{by} after step {trainer.step} of {trainer.settings.steps}, saved; "
            f"go on with: {_command(folder, ranks)}"
        )
        ranks.first(lambda: _tell(line))
        if unprinted is not None and interruption.cause is None:
            raise unprinted
        raise typer.Exit(interruption.exit_code)
    summary = trainer.summary()
    ranks.first(lambda: folder.write_summary(as_json(summary)))
    if unprinted is not None:
        raise unprinted
    view.summarise(summary, folder.path)
    _check_finite(trainer, summary.evaluation[trainer.task.quality])


def _closed(views: ExitStack) -> OSError | None:
    """Close a view; return what kept it from being shown to its end."""
    try:
        views.close()
    except OSError as error:
        return error
    return None


def _tell(line: str) -> None:
    """Print how a run ended: among the errors, where it can be printed nowhere else."""
    try:
        typer.echo(line)
    except OSError:
        with suppress(OSError):
            typer.echo(line, err=True)


def _check_finite(trainer: "Trainer", quality: float | None) -> None:
    if quality is None or not math.isfinite(quality):
        name = trainer.task.quality
        raise NonFiniteLoss(
            f"the run ended, but its held-out {name} is {'not finite' if quality is None else quality}: look at "
            "evaluate of the task and at the model's outputs on held-out data, or lower the learning rate"
        )


def _finished(trainer: "Trainer", folder: "RunFolder", summary: Mapping[str, Any]) -> tuple[str, float | None]:
    from duotone.cli.train_view import quality_name

    evaluation = summary.get("evaluation")
    quality = evaluation.get(trainer.task.quality) if isinstance(evaluation, dict) else None
    quality = quality if isinstance(quality, int | float) else None
    figure = "" if quality is None else f", {quality_name(trainer.task)} {quality:.4f}"
    return f"{folder.path} is finished at step {trainer.step}{figure}; there is nothing left to do", quality


def _command(folder: "RunFolder", ranks: "Group") -> str:
    start = "duotone train" if ranks.size == 1 else f"torchrun --nproc-per-node {ranks.size} -m duotone train"
    return f"{start} --resume --out {shlex.quote(str(folder.path))}"


def _keep_quiet(_: str) -> None:
    """Tell nothing: another rank does."""
