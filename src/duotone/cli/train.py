"""`duotone train`: train a built-in task or the user's own under a policy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duotone.errors import TaskError

if TYPE_CHECKING:
    from duotone.train import RunFolder, RunSettings, Task, Trainer

_RUNS = Path("runs")


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
    micro_batches: Annotated[int | None, typer.Option(help="Batches accumulated into one step.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines of metrics.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of these settings; flags go before it.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings as YAML and exit.")] = False,
    out: Annotated[Path | None, typer.Option(help="The run's folder. (default: runs/TASK-POLICY-N)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    stop_after: Annotated[int | None, typer.Option(help="Stop cleanly after this step; --resume goes on.")] = None,
) -> None:
    """Train a task under a policy: metrics, checkpoints, and a summary at the end."""
    from duotone.train import RunFolder, Trainer, next_free_folder

    flags = {
        "task": task,
        "policy": policy,
        "steps": steps,
        "seed": seed,
        "device": device,
        "backend": backend,
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
    }
    given = {name: None if value == "none" else value for name, value in flags.items() if value is not None}
    if stop_after is not None and stop_after < 1:
        raise TaskError(f"--stop-after is {stop_after}; it must be at least 1")
    if resume and out is None:
        raise TaskError("--resume needs --out, the folder of the run to go on with")
    found, settings = _open_task(given, config, out if resume else None)
    if print_config:
        typer.echo(settings.to_yaml(), nl=False)
        return

    folder = RunFolder(out or next_free_folder(_RUNS, settings))
    if resume:
        folder.check_same_run(settings)
    else:
        folder.check_free()
    trainer = Trainer(found, settings, folder)
    if resume:
        trainer.resume()
    else:
        folder.start(settings)
    _run(trainer, folder, stop_after)


def _open_task(given: dict[str, Any], config: Path | None, resumed: Path | None) -> "tuple[Task, RunSettings]":
    import torch

    from duotone.train import RunFolder, find_task, read_config, resolve_settings

    told = RunFolder(resumed).settings() if resumed is not None else {}
    told |= read_config(config) if config is not None else {}
    told |= given
    # whatever the task does not decide is checked before its data are read
    early = resolve_settings(told)
    torch.manual_seed(early.seed)
    task = find_task(early.task)
    return task, resolve_settings(dict(task.settings), told)


def _run(trainer: "Trainer", folder: "RunFolder", stop_after: int | None) -> None:
    from duotone.cli.train_view import open_view
    from duotone.train import as_json

    with open_view(trainer) as view:
        for metrics in trainer.run(stop_after):
            view.show(metrics)
    if trainer.step < trainer.settings.steps:
        typer.echo(
            f"stopped after step {trainer.step} of {trainer.settings.steps}; "
            f"go on with: duotone train --resume --out {folder.path}"
        )
        return
    summary = trainer.summary()
    folder.write_summary(as_json(summary))
    view.summarise(summary, folder.path)
