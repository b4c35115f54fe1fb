"""What `duotone compare` shows while it runs: a bar for each arm on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from duotone.compare import Fit, Pace, Plan, Run, Trial, Watcher
from duotone.compare.report import words
from duotone.compare.watcher import SilentWatcher


@contextmanager
def open_view(console: Console) -> Iterator[Watcher]:
    """Open the view that fits the console."""
    if not console.is_terminal:
        yield _LineView(console)
        return
    columns = (
        TextColumn("{task.fields[arm]}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        yield _BarView(console, progress)


class _LineView(SilentWatcher):
    """A line for each trial and each run when it has ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._plan: Plan | None = None

    def begins(self, plan: Plan) -> None:
        self._plan = plan
        arms = ", ".join(arm.name for arm in plan.arms)
        self._print(f"{plan.task}: {arms}; each is tried, then trained {_times(len(plan.seeds))}")

    def trial_ends(self, trial: Trial) -> None:
        parts = []
        if trial.phases is not None:
            parts.append(f"{words.seconds(trial.phases.step)} a step")
        if trial.peak_memory_bytes is not None:
            parts.append(f"{words.size(trial.peak_memory_bytes)} of memory")
        if trial.failure is not None:
            parts.append(f"{trial.failure.kind}: {trial.failure.reason}")
        self._print(f"tried {trial.arm}: {', '.join(parts)}")

    def paced(self, pace: Pace, runs_left: int) -> None:
        turns = f"arms taking turns of {words.counted(pace.turn_steps, 'step')}"
        how = turns if pace.together else "one arm after the other"
        self._print(f"{words.counted(runs_left, 'run')} of {words.counted(pace.steps, 'step')}, {how}")

    def run_ends(self, run: Run) -> None:
        if run.failure is not None:
            self._print(f"{run.arm}, seed {run.seed}: {run.failure.kind}: {run.failure.reason}")
            return
        figures = ", ".join(f"{name} {words.quality(value)}" for name, value in run.evaluation.items())
        self._print(f"{run.arm}, seed {run.seed}: {figures} after {run.steps} steps in {run.seconds:.1f} s")

    def fit_tried(self, arm: str, micro_batch: int, peak_bytes: int | None) -> None:
        peak = "does not fit" if peak_bytes is None else f"takes {words.size(peak_bytes)}"
        self._print(f"{arm}: a micro-batch of {micro_batch} {peak}")

    def fit_ends(self, fit: Fit) -> None:
        if fit.failure is not None:
            self._print(f"{fit.arm}: {fit.failure.kind}: {fit.failure.reason}")
        else:
            self._print(f"{fit.arm}: a micro-batch of {fit.micro_batch} fits into {words.size(fit.limit_bytes)}")

    def _print(self, line: str) -> None:
        # not as markup: a reason may hold brackets
        self._console.print(Text(line), soft_wrap=True)


class _BarView(_LineView):
    """A bar for each arm that is training, over the lines of what has ended."""

    def __init__(self, console: Console, progress: Progress) -> None:
        super().__init__(console)
        self._progress = progress
        self._steps = 0
        self._bars: dict[str, TaskID] = {}

    def trial_begins(self, arm: str) -> None:
        self._bars[arm] = self._progress.add_task("tried", total=None, arm=arm)

    def trial_ends(self, trial: Trial) -> None:
        self._remove(trial.arm)
        super().trial_ends(trial)

    def paced(self, pace: Pace, runs_left: int) -> None:
        super().paced(pace, runs_left)
        self._steps = pace.steps

    def run_begins(self, arm: str, seed: int) -> None:
        self._bars[arm] = self._progress.add_task(f"seed {seed}", total=self._steps, arm=arm)

    def turn_ends(self, arm: str, seed: int, step: int, loss: float, step_seconds: float) -> None:
        text = f"seed {seed}  loss {loss:.3f}  {words.seconds(step_seconds)}"
        self._progress.update(self._bars[arm], completed=step, description=text)

    def run_ends(self, run: Run) -> None:
        self._remove(run.arm)
        super().run_ends(run)

    def fit_tried(self, arm: str, micro_batch: int, peak_bytes: int | None) -> None:
        if arm not in self._bars:
            self._bars[arm] = self._progress.add_task("", total=None, arm=arm)
        peak = "too much" if peak_bytes is None else words.size(peak_bytes)
        self._progress.update(self._bars[arm], description=f"micro-batch {micro_batch}: {peak}")

    def fit_ends(self, fit: Fit) -> None:
        self._remove(fit.arm)
        super().fit_ends(fit)

    def _remove(self, arm: str) -> None:
        bar = self._bars.pop(arm, None)
        if bar is not None:
            self._progress.remove_task(bar)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
