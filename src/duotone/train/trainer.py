"""Trains a task under a policy, through Duotone's public verbs alone, as a user would.

`Trainer.run()` yields one `Metrics` per logged step; between them nothing waits for the device. Everything that the
next step depends on goes into a checkpoint, so a run that was stopped and resumed ends in the same bits. Several ranks
each have a trainer and take the same steps: N ranks with M micro-batches use the batches that one process with N * M
does. Rank 0 alone writes, except for the sharded parts of checkpoints.
"""

import math
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

import duotone.torch as dt
from duotone.errors import CheckpointError, DuotoneWarning, NonFiniteLoss, TaskError
from duotone.run_settings import RunSettings
from duotone.train.compilation import Compilation
from duotone.train.group import Group
from duotone.train.metrics import Metrics, Summary
from duotone.train.optimizer import optimizer_of
from duotone.train.position import check_position
from duotone.train.run_folder import RunFolder, step_of
from duotone.train.schedule import SavedSchedule, cosine_schedule
from duotone.train.spread import spread
from duotone.train.task import Batch, Task, check_loss, figures_of, on_device


class Trainer:
    """One run of a task.

    Attributes:
        step: optimizer steps so far.
        resumed_at: the step that it was resumed at, or None if it began the run.
        compilation: what compiling the model took so far.

    Args:
        task: what to train; its model is cast in place.
        settings: how.
        folder: where metrics and checkpoints are written, the same on all ranks; None to write nothing.
        ranks: the processes that train together; None for this one alone.

    Raises:
        TaskError: the machine lacks the device, or the settings ask for ranks and there are none.
        PolicyError: the model cannot be cast, or not distributed over ranks.

    >>> from duotone.train import RunSettings, built_in_task, resolve_settings
    >>> task = built_in_task("stdlib-text:tiny")
    >>> settings = resolve_settings(task.settings, {"task": task.name, "policy": "bf16", "steps": 4, "log_every": 2})
    >>> trainer = Trainer(task, settings)
    >>> [metrics.step for metrics in trainer.run()]
    [2, 4]
    >>> trainer.summary().memory.bytes_per_parameter
    14.0
    """

    def __init__(
        self, task: Task, settings: RunSettings, folder: RunFolder | None = None, ranks: Group | None = None
    ) -> None:
        self.task = task
        self.settings = settings
        self.folder = folder
        self.ranks = ranks or Group()
        mode = self.ranks.mode(settings.parallel)
        self.device = self.ranks.device(settings.device)
        self.model = dt.cast(self.ranks.broadcast(task.model.to(self.device)), settings.policy)
        if settings.compile and mode == "fsdp":
            raise TaskError(
                'compile is true and parallel "fsdp", and a model whose parts are gathered is not compiled as one '
                "graph; use parallel ddp, or do not compile"
            )
        self.compilation = Compilation(self.model if settings.compile else None, self.device)
        self._spread = spread(self.model, mode)
        self.optimizer = optimizer_of(self.model, settings)
        self.scaler = dt.LossScaler(settings.policy)
        self.schedule = cosine_schedule(self.optimizer, settings)
        self._saved_schedule = SavedSchedule(self.schedule)
        self.step = 0
        self.resumed_at: int | None = None
        self._epoch = 0
        self._batches_taken = 0
        self._losses = torch.zeros((), device=self.device)
        self._losses_added = 0
        self._units = 0
        self._seconds = 0.0
        self._stop_asked = False
        self._batches_per_step = self.ranks.size * settings.micro_batches
        self.ranks.seed_generators(settings.seed)

    def resume(self, which: Literal["latest", "latest-valid"] = "latest") -> None:
        """Go on from a checkpoint in the folder.

        Args:
            which: the newest, or the newest intact one. A warning then names the damaged ones, which are removed, and
                says how many steps are done again.

        Raises:
            CheckpointError: there is none, or it is damaged, of another policy, or does not fit. Nothing is changed
                then; if an older one is intact, the message says so.
        """
        if self.folder is None:
            raise CheckpointError("a run without a folder has no checkpoint to resume from")
        folder = self.folder
        path, broken = self.ranks.first(lambda: folder.find_checkpoint(which))
        progress = dt.load_checkpoint(path, self.model, self.optimizer, self.scaler, scheduler=self._saved_schedule)
        check_position(path, progress)
        self.step = self.resumed_at = progress["step"]
        self._epoch = progress["epoch"]
        self._batches_taken = progress["batches_taken"]
        self._restore_losses(progress["losses"], progress["losses_added"])
        self.ranks.first(lambda: folder.cut_metrics(self.step))
        if broken:
            repeated = self.ranks.first(lambda: step_of(folder.checkpoints()[0])) - self.step
            warnings.warn(
                f"passed over {_listed(broken)}; going on from {path.name}, "
                f"{repeated} {'step is' if repeated == 1 else 'steps are'} done again",
                DuotoneWarning,
                stacklevel=2,
            )
        if progress["batches_per_step"] != self._batches_per_step:
            batches = "1 batch" if self._batches_per_step == 1 else f"{self._batches_per_step} batches"
            each = f", {self.settings.micro_batches} on each of {self.ranks.size} ranks" if self.ranks.size > 1 else ""
            warnings.warn(
                f"a step takes {batches} from here on{each}, where it took {progress['batches_per_step']}; "
                "the run goes on in the data where it stood",
                DuotoneWarning,
                stacklevel=2,
            )
        self.ranks.first(folder.remove_leftovers)
        self.ranks.first(lambda: folder.remove_old_checkpoints(self.step, self.settings.keep))

    def stop(self) -> None:
        """Ask `run` to end after the step that it is in, with that saved. A signal handler may call this."""
        self._stop_asked = True

    def run(self, stop_after: int | None = None) -> Iterator[Metrics]:
        """Train to the last step, or to `stop_after`, and yield the metrics of every logged step.

        The last step is always logged, evaluated and saved; a stop, by `stop_after` or `stop()`, is saved.

        Raises:
            TaskError: the data set is empty, a loss is not a scalar, or metrics could not be written.
            NonFiniteLoss: the loss itself is Inf or NaN.
            LossScaleCollapse: step after step is skipped.
            CheckpointError: a checkpoint could not be written; those before it are untouched.
        """
        last = self.settings.steps if stop_after is None else min(stop_after, self.settings.steps)
        batches = self.ranks.share(self._batches())
        timed_units, timed_seconds = self._units, self._seconds
        while self.step < last:
            stop_asked = self.ranks.any(lambda: self._stop_asked)
            report, lr = self._train_step(batches)
            ends = self.step == self.settings.steps
            evaluates = ends or self.step % self.settings.evaluate_every == 0
            if evaluates or self.step % self.settings.log_every == 0:
                metrics = self._metrics(report, lr, evaluates, timed_units, timed_seconds)
                timed_units, timed_seconds = self._units, self._seconds
                if self.folder is not None:
                    self.ranks.first(partial(self.folder.append_metrics, asdict(metrics)))
                yield metrics
            self.optimizer.zero_grad()
            # read once: a stop that is asked for from here on gets one more step, and that one is saved
            stops = stop_asked()
            if stops or self.step == last or self.step % self.settings.checkpoint_every == 0:
                self.save()
            if stops:
                self._stop_asked = False
                return

    def save(self) -> None:
        """Write a checkpoint of this step into the folder, if there is one, and remove what is too old to keep.

        Raises:
            CheckpointError: it could not be written; those before it are untouched.
        """
        if self.folder is None:
            return
        folder = self.folder
        losses, added = zip(*self.ranks.gather((self._losses.item(), self._losses_added)), strict=True)
        progress = {
            "step": self.step,
            "epoch": self._epoch,
            "batches_taken": self._batches_taken,
            "batches_per_step": self._batches_per_step,
            "losses": torch.tensor(losses),
            "losses_added": list(added),
        }
        path = folder.checkpoint_path(self.step)
        self.ranks.first(folder.flush_metrics)
        try:
            dt.save_checkpoint(
                path, self.model, self.optimizer, self.scaler, scheduler=self._saved_schedule, progress=progress
            )
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self.ranks.first(folder.what_remains)}") from error
        self.ranks.first(lambda: folder.remove_old_checkpoints(self.step, self.settings.keep))

    def summary(self) -> Summary:
        """Evaluate the model as it is, and return the result of the run."""
        units, seconds = zip(*self.ranks.gather((self._units, self._seconds)), strict=True)
        return Summary(
            step=self.step,
            skipped=int(self.scaler.skipped),
            seconds=max(seconds),
            units_per_second=sum(units) / max(seconds) if max(seconds) else 0.0,
            evaluation=self._evaluate(),
            memory=dt.memory(self.model, self.optimizer),
            compile_seconds=self.compilation.seconds,
        )

    def _train_step(self, batches: Iterator[Batch]) -> tuple[Any, float]:
        started, compiled = time.perf_counter(), self.compilation.seconds
        for left in reversed(range(self.settings.micro_batches)):
            batch = next(batches)
            loss = self._spread.loss(self.task.loss, on_device(batch, self.device), is_last=left == 0)
            check_loss(self.task, loss)
            self.scaler.backward(loss / self.settings.micro_batches)
            self._losses += loss.detach().float().reshape(())
            self._losses_added += 1
            self._units += self.task.units_in(batch)
        # on a GPU the schedule advances for the step before now, as the step itself would have it
        self.scaler.drain()
        lr = float(self.schedule.get_last_lr()[0])
        report = self.scaler.step(self.optimizer, clip_norm=self.settings.clip_norm, scheduler=self.schedule)
        self.step += 1
        self._seconds += time.perf_counter() - started - (self.compilation.seconds - compiled)
        return report, lr

    def _metrics(self, report: Any, lr: float, evaluates: bool, timed_units: int, timed_seconds: float) -> Metrics:
        started = time.perf_counter()
        own_loss = self._losses.item()
        # work that the device had still to do belongs to the steps before
        self._seconds += time.perf_counter() - started
        own = (own_loss, self._losses_added, self._units - timed_units, self._seconds - timed_seconds)
        losses, added, units, seconds = zip(*self.ranks.gather(own), strict=True)
        loss = sum(losses) / sum(added)
        self._losses.zero_()
        self._losses_added = 0
        self._check_loss(loss)
        quality = self._evaluate()[self.task.quality] if evaluates else None
        grad_norm = report.grad_norm.item()
        return Metrics(
            step=self.step,
            loss=loss,
            quality=quality,
            lr=lr,
            loss_scale=report.loss_scale.item(),
            skipped=int(self.scaler.skipped),
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            units_per_second=sum(units) / max(*seconds, 1e-9),
            peak_memory_bytes=max(self.ranks.gather(_peak_memory_bytes(self.device)), key=lambda peak: peak or 0),
        )

    def _evaluate(self) -> dict[str, float]:
        with self.compilation.evaluating():
            own = figures_of(self.task, self._spread.evaluate(self.task.evaluate))
        # all ranks use the same data, but rounding may depend on the machine
        return self.ranks.gather(own)[0]

    def _restore_losses(self, losses: Tensor, added: list[int]) -> None:
        """Take up the sums since the last line of metrics: each rank its own, or rank 0 all those of another number."""
        if len(added) != self.ranks.size:
            others = self.ranks.size - 1
            losses, added = torch.tensor([losses.sum(), *[0.0] * others]), [sum(added), *[0] * others]
        self._losses.copy_(losses[self.ranks.rank])
        self._losses_added = added[self.ranks.rank]

    def _check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss became {loss} by step {self.step}: that is the forward pass, not the loss scale; "
                "look at the data, lower the learning rate, or keep the module that overflows in FP32 by a rule"
            )

    def _batches(self) -> Iterator[Batch]:
        """Yield batches without end, from the run's position in the data, and keep that position."""
        while True:
            generator = torch.Generator().manual_seed(self.settings.seed * 2**32 + self._epoch)
            epoch = iter(self.task.batches(generator))
            # drawing what was used up before must not move the random states that the checkpoint restored
            with torch.random.fork_rng(devices=[]):
                # the range first: where it ends, no batch is drawn
                for _ in zip(range(self._batches_taken), epoch, strict=False):
                    pass
            for batch in epoch:
                self._batches_taken += 1
                yield batch
            if self._batches_taken == 0:
                raise TaskError(f"the data set of task {self.task.name!r} is empty: an epoch yields no batch")
            self._epoch += 1
            self._batches_taken = 0


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _peak_memory_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
