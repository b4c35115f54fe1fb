"""The verb `export`: the weights of a run, out of one of its checkpoints, in a file for those who know no masters."""

from pathlib import Path
from typing import Annotated

import typer

from duotone.cli.values import path_value, whole_number
from duotone.errors import CheckpointError


def export_command(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of the run, or of one checkpoint.", show_default=False, parser=path_value, metavar="RUN"
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The file: .safetensors, or .pt, .pth, .bin, .ckpt for torch.save.",
            show_default=False,
            parser=path_value,
            metavar="FILE",
        ),
    ],
    dtype: Annotated[
        str, typer.Option(help="Of the weights; buffers keep theirs.", metavar="float32|bfloat16|float16")
    ] = "float32",
    step: Annotated[
        int | None,
        typer.Option(help="The checkpoint after this step. (default: the last)", parser=whole_number, metavar="int"),
    ] = None,
) -> None:
    """Write a run's weights to a file: FP32 masters, or rounded to 16 bits."""
    from duotone.torch.exporting import export_checkpoint

    checkpoint = _checkpoint(run, step)
    export_checkpoint(checkpoint, out, dtype)
    typer.echo(f"wrote the weights of {checkpoint.name} in {dtype} to {out}")


def _checkpoint(run: Path, step: int | None) -> Path:
    from duotone.train import RunFolder
    from duotone.train.run_folder import step_of

    if step is None and (run / "manifest.json").exists():
        return run
    checkpoints = RunFolder(run).checkpoints()
    if not checkpoints:
        raise CheckpointError(
            f"{run} holds no checkpoint to export; give the folder of a run, such as runs/digits-bf16-1"
        )
    steps = [step_of(path) for path in checkpoints]
    if step is not None and step not in steps:
        raise CheckpointError(f"{run} has no checkpoint after step {step}; it has {', '.join(map(str, sorted(steps)))}")
    return checkpoints[0 if step is None else steps.index(step)]
