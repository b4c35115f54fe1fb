"""`duotone train`: train a built-in task or the user's own under a policy."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from duotone.errors import TaskError, nearest_names

if TYPE_CHECKING:
    from duotone.train import Ranks, RunFolder, RunSettings, Task, Trainer

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


def _norm(text: str) -> float | str:
    return "none" if text == "none" else float(text)


def train_command(
    task: Annotated[
        str | None,
        typer.Argument(
            help="stdlib-text (the default), digits, name:variant, or a path/to/task.py.", show_default=False
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, bf16-mixed, fp16-mixed, ... (default: bf16)")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the model and the batches. (default: 0)")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ... (default: auto)")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Of the optimizer's kernels: auto, reference, cpu, cuda. (default: auto)")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, sgd or lion.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="The highest of the schedule.")
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of linear warm-up before the cosine.")] = None,
    final_lr_fraction: Annotated[float | None, typer.Option(help="Where the cosine ends, of the highest rate.")] = None,
    betas: Annotated[tuple[float, float] | None, typer.Option(help="AdamW's or Lion's.")] = None,
    momentum: Annotated[float | None, typer.Option(help="SGD's.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="The optimizer's.")] = None,
    clip_norm: Annotated[
        Any, typer.Option(help="Largest norm of the true gradient, or none.", parser=_norm, metavar="FLOAT|none")
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="Of ranks that torchrun starts: ddp, a copy on each; fsdp, a part; auto, ddp if there are several. "
            "(default: auto)"
        ),
    ] = None,
    micro_batches: Annotated[int | None, typer.Option(help="Batches accumulated into one step, on each rank.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines of metrics.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints that stay, the newest. (default: 2)")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of these settings; flags go before it.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings as YAML and exit.")] = False,
    out: Annotated[Path | None, typer.Option(help="The run's folder. (default: runs/TASK-POLICY-N)")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on with the run in --out, from its newest checkpoint or its newest intact one.",
            metavar="[latest|latest-valid]",
        ),
    ] = None,
    stop_after: Annotated[int | None, typer.Option(help="Stop cleanly after this step; --resume goes on.")] = None,
) -> None:
    """Train a task under a policy: metrics, checkpoints, and a summary at the end."""
    from duotone.cli.one_voice import one_voice
    from duotone.train import open_ranks

    flags = {
        "task": task,
        "policy": policy,
        "steps": steps,
        "seed": seed,
        "device": device,
        "backend": backend,
        "parallel": parallel,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "final_lr_fraction": final_lr_fraction,
        "betas": betas,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
        "micro_batches": micro_batches,
        "log_every": log_every,
        "evaluate_every": evaluate_every,
        "checkpoint_every": checkpoint_every,
        "keep": keep,
    }
    given = {name: None if value == "none" else value for name, value in flags.items() if value is not None}
    with open_ranks() as ranks, one_voice(ranks):
        if stop_after is not None and stop_after < 1:
            raise TaskError(f"--stop-after is {stop_after}; it must be at least 1")
        if resume is not None and resume not in RESUMES:
            raise TaskError(f'--resume is "{resume}"; {nearest_names(resume, RESUMES)}')
        if resume and out is None:
            raise TaskError("--resume needs --out, the folder of the run to go on with")
        found, settings = _open_task(given, config, out if resume else None, ranks)
        if print_config:
            ranks.first(lambda: typer.echo(settings.to_yaml(), nl=False))
            return
        _run(_open_trainer(found, settings, out, resume, ranks), stop_after)


def _open_trainer(
    task: "Task", settings: "RunSettings", out: Path | None, resume: str | None, ranks: "Ranks"
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
    given: dict[str, Any], config: Path | None, resumed: Path | None, ranks: "Ranks"
) -> "tuple[Task, RunSettings]":
    import random

    import numpy as np
    import torch

    from duotone.train import RunFolder, find_task, read_config, resolve_settings

    def read() -> dict[str, Any]:
        own = RunFolder(resumed).settings() if resumed is not None else {}
        if ranks.size == 1:
            # how several shared the run's model does not bind one
            own.pop("parallel", None)
        return own | (read_config(config) if config is not None else {}) | given

    told = ranks.first(read)
    # whatever the task does not decide is checked before its data are read
    early = resolve_settings(told)
    ranks.mode(early.parallel)
    # a task may draw from any of them, and a run that starts again must draw the same
    random.seed(early.seed)
    np.random.seed(early.seed % 2**32)
    torch.manual_seed(early.seed)
    task = ranks.agree(lambda: find_task(early.task))
    return task, resolve_settings(dict(task.settings), told)


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
        # the others may be anywhere, so nothing is agreed upon with them
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


def _command(folder: "RunFolder", ranks: "Ranks") -> str:
    start = "duotone train" if ranks.size == 1 else f"torchrun --nproc-per-node {ranks.size} -m duotone train"
    return f"{start} --resume --out {shlex.quote(str(folder.path))}"


def _keep_quiet(_: str) -> None:
    """Tell nothing: another rank does."""
