"""What `duotone train` shows: a progress bar on a terminal, plain lines elsewhere, and the summary."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.nn.parameter import is_lazy

from duotone.cli.output import Output
from duotone.train import Metrics, Summary, Task, Trainer


class View(Protocol):
    """What a run is shown on."""

    def show(self, metrics: Metrics) -> None:
        """Show the metrics of a logged step."""
        ...

    def summarise(self, summary: Summary, folder: Path) -> None:
        """Show what the run came to."""
        ...


@contextmanager
def open_view(trainer: Trainer, console: Console | None = None) -> Iterator[View]:
    """Print what is about to run, and open the view that fits the console."""
    console = console or Output()
    settings, task = trainer.settings, trainer.task
    # what a lazy module has is known after the first step
    count = sum(param.numel() for param in trainer.model.parameters() if not is_lazy(param))
    console.print(f"[bold]{task.name}[/bold] under [bold]{settings.policy.name}[/bold] on {_place(trainer)}")
    console.print(f"  parameters: {count:,}")
    if settings.compile:
        console.print("  compiling: the first step takes longer; that is not counted as training")
    for name, fact in task.facts.items():
        console.print(f"  {name}: {fact}")
    if console.is_terminal:
        with _bar(console) as progress:
            yield _BarView(trainer, console, progress)
    else:
        yield _LineView(trainer, console)


def quality_name(task: Task) -> str:
    """Return what a task's quality is called beside the training loss."""
    return "held-out loss" if task.quality == "loss" else task.quality


def _place(trainer: Trainer) -> str:
    ranks = trainer.ranks
    mode = ranks.mode(trainer.settings.parallel)
    return f"{trainer.device.type}, {ranks.size} ranks, {mode}" if ranks.size > 1 else str(trainer.device)


class _LineView:
    """A line for each logged step."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self._trainer = trainer
        self._console = console
        self._graphs_told = 0

    def show(self, metrics: Metrics) -> None:
        self._tell_of_graphs()
        parts = [f"step {metrics.step}/{self._trainer.settings.steps}", self._figures(metrics)]
        if metrics.quality is not None:
            parts.append(self._quality(metrics.quality))
        self._console.print("  ".join(parts), soft_wrap=True)

    def summarise(self, summary: Summary, folder: Path) -> None:
        task = self._trainer.task
        quality = summary.evaluation[task.quality]
        # a title is broken to the width of its table
        table = Table(title=f"{'lower' if task.lower_is_better else 'higher'} is better")
        table.add_column("method")
        table.add_column(f"held-out {task.quality}", justify="right")
        table.add_row(f"this run, {self._trainer.settings.policy.name}", f"{quality:.4f}", style="bold")
        for name, value in task.baselines.items():
            table.add_row(name, f"{value:.4f}")
        self._console.print(table)
        for name, value in summary.evaluation.items():
            if name != task.quality:
                self._console.print(f"{name}: {value:.4f}")
        line = f"steps: {summary.step} ({summary.skipped} skipped)"
        if summary.seconds:
            since = "" if self._trainer.resumed_at is None else " since it was resumed"
            line += f" in {summary.seconds:.1f} s of training{since}, {summary.units_per_second:,.0f} {task.unit}/s"
        self._console.print(line, soft_wrap=True)
        self._console.print(_memory_line(summary))
        self._console.print(f"run: {folder}")

    def _tell_of_graphs(self) -> None:
        """Say how long compiling took, once for each time that something new was compiled."""
        compilation = self._trainer.compilation
        if compilation.graphs != self._graphs_told:
            self._graphs_told = compilation.graphs
            graphs = "1 graph" if compilation.graphs == 1 else f"{compilation.graphs} graphs"
            self._console.print(f"compiled {graphs} in {compilation.seconds:.1f} s", soft_wrap=True)

    def _figures(self, metrics: Metrics) -> str:
        task = self._trainer.task
        parts = [f"loss {metrics.loss:.4f}", f"{metrics.units_per_second:,.0f} {task.unit}/s"]
        if not self._trainer.scaler.settings.is_none:
            parts.append(f"scale {metrics.loss_scale:g}")
        if metrics.skipped or not self._trainer.scaler.settings.is_none:
            parts.append(f"skipped {metrics.skipped}")
        return "  ".join(parts)

    def _quality(self, value: float) -> str:
        return f"{quality_name(self._trainer.task)} {value:.4f}"


class _BarView(_LineView):
    """A progress bar with the last figures, and a line for each evaluation."""

    def __init__(self, trainer: Trainer, console: Console, progress: Progress) -> None:
        super().__init__(trainer, console)
        self._progress = progress
        self._bar = progress.add_task("", total=trainer.settings.steps, completed=trainer.step)

    def show(self, metrics: Metrics) -> None:
        self._tell_of_graphs()
        self._progress.update(self._bar, completed=metrics.step, description=self._figures(metrics))
        if metrics.quality is not None:
            self._console.print(f"step {metrics.step}  {self._quality(metrics.quality)}")


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.description}"),
        console=console,
    )


def _memory_line(summary: Summary) -> str:
    memory = summary.memory
    roles = {
        "weights": memory.weights_bytes,
        "tails": memory.tails_bytes,
        "gradients": memory.gradients_bytes,
        "moments": memory.moments_bytes,
    }
    parts = " + ".join(f"{role} {size / memory.parameters:g}" for role, size in roles.items())
    return f"bytes per parameter: {memory.bytes_per_parameter:g} = {parts}"
