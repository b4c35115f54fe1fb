"""Trains a task under a policy, through Duotone's public verbs alone, as a user would.

`Trainer.run()` yields one `Metrics` per logged step; between them nothing waits for the device. Everything that the
next step depends on goes into a checkpoint, so a run that was stopped and resumed ends in the same bits.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import duotone.torch as dt
from duotone.errors import CheckpointError, LossScaleCollapse, NonFiniteLoss, TaskError
from duotone.train.metrics import Metrics, Summary
from duotone.train.run_folder import RunFolder
from duotone.train.schedule import WarmupCosine
from duotone.train.settings import RunSettings, find_device
from duotone.train.task import Batch, Task

# calibration from 2^16 to the floor takes 16 skipped steps, and a growth into overflow one; this many is no accident
PATIENCE = 50


class Trainer:
    """One run of a task.

    Args:
        task: what to train; its model is cast in place.
        settings: how.
        folder: where metrics and checkpoints go; None to keep nothing.

    Raises:
        TaskError: the device is not there.
        PolicyError: the model cannot be cast.

    >>> from duotone.train import RunSettings, built_in_task, resolve_settings
    >>> task = built_in_task("stdlib-text:tiny")
    >>> settings = resolve_settings(task.settings, {"task": task.name, "policy": "bf16", "steps": 4, "log_every": 2})
    >>> trainer = Trainer(task, settings)
    >>> [metrics.step for metrics in trainer.run()]
    [2, 4]
    >>> trainer.summary().memory.bytes_per_parameter
    14.0
    """

    def __init__(self, task: Task, settings: RunSettings, folder: RunFolder | None = None) -> None:
        self.task = task
        self.settings = settings
        self.folder = folder
        self.device = find_device(settings.device)
        self.model = dt.cast(task.model.to(self.device), settings.policy)
        self.optimizer = _optimizer(self.model, settings)
        self.scaler = dt.LossScaler(settings.policy)
        self.schedule = WarmupCosine(
            self.optimizer,
            self.device,
            peak=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            steps=settings.steps,
            final_fraction=settings.final_lr_fraction,
        )
        self.step = 0
        self._epoch = 0
        self._batches_taken = 0
        self._losses = torch.zeros((), device=self.device)
        self._losses_added = 0
        self._units = 0
        self._seconds = 0.0

    def resume(self) -> None:
        """Go on from the newest checkpoint in the folder.

        Raises:
            CheckpointError: there is none, or it is damaged, of another policy, or does not fit.
        """
        if self.folder is None:
            raise CheckpointError("a run without a folder has no checkpoint to resume from")
        progress = dt.load_checkpoint(
            self.folder.latest_checkpoint(), self.model, self.optimizer, self.scaler, scheduler=self.schedule
        )
        self.step = progress["step"]
        self._epoch = progress["epoch"]
        self._batches_taken = progress["batches_taken"]
        self._losses = progress["losses"].to(self.device)
        self._losses_added = progress["losses_added"]
        self.folder.cut_metrics(self.step)

    def run(self, stop_after: int | None = None) -> Iterator[Metrics]:
        """Train to the last step, or to `stop_after`, and yield the metrics of every logged step.

        The last step is always logged, evaluated and saved; a stop is saved.

        Raises:
            TaskError: the data set is empty, or a loss is not a scalar.
            NonFiniteLoss: the loss itself is Inf or NaN.
            LossScaleCollapse: step after step is skipped.
        """
        last = self.settings.steps if stop_after is None else min(stop_after, self.settings.steps)
        batches = self._batches()
        timed_units, timed_seconds = self._units, self._seconds
        while self.step < last:
            report, lr = self._train_step(batches)
            ends = self.step == self.settings.steps
            evaluates = ends or self.step % self.settings.evaluate_every == 0
            if evaluates or self.step % self.settings.log_every == 0:
                metrics = self._metrics(report, lr, evaluates, timed_units, timed_seconds)
                timed_units, timed_seconds = self._units, self._seconds
                if self.folder is not None:
                    self.folder.append_metrics(asdict(metrics))
                yield metrics
            self.optimizer.zero_grad()
            if self.step == last or self.step % self.settings.checkpoint_every == 0:
                self.save()

    def save(self) -> None:
        """Write a checkpoint of this step into the folder, if there is one."""
        if self.folder is None:
            return
        progress = {
            "step": self.step,
            "epoch": self._epoch,
            "batches_taken": self._batches_taken,
            "losses": self._losses,
            "losses_added": self._losses_added,
        }
        path = self.folder.checkpoint_path(self.step)
        dt.save_checkpoint(path, self.model, self.optimizer, self.scaler, scheduler=self.schedule, progress=progress)
        self.folder.remove_old_checkpoints()

    def summary(self) -> Summary:
        """Evaluate the model as it is, and sum the run up."""
        return Summary(
            step=self.step,
            skipped=int(self.scaler.skipped),
            seconds=self._seconds,
            units_per_second=self._units / self._seconds if self._seconds else 0.0,
            evaluation=self._evaluate(),
            memory=dt.memory(self.model, self.optimizer),
        )

    def _train_step(self, batches: Iterator[Batch]) -> tuple[dt.StepReport, Tensor]:
        started = time.perf_counter()
        for _ in range(self.settings.micro_batches):
            batch = next(batches)
            loss = self.task.loss(self.model, _to_device(batch, self.device))
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise TaskError(f"the loss of task {self.task.name!r} is {got}; it must be a tensor of one element")
            self.scaler.backward(loss / self.settings.micro_batches)
            self._losses += loss.detach().float().reshape(())
            self._losses_added += 1
            self._units += self.task.units_in(batch)
        lr = self.schedule.learning_rate.clone()
        report = self.scaler.step(self.optimizer, clip_norm=self.settings.clip_norm)
        self.schedule.advance(report.skipped)
        self.step += 1
        self._seconds += time.perf_counter() - started
        return report, lr

    def _metrics(
        self, report: dt.StepReport, lr: Tensor, evaluates: bool, timed_units: int, timed_seconds: float
    ) -> Metrics:
        started = time.perf_counter()
        loss = (self._losses / self._losses_added).item()
        # what the device had still to do is part of the steps before
        self._seconds += time.perf_counter() - started
        self._losses.zero_()
        self._losses_added = 0
        self._check_health(loss)
        quality = self._evaluate()[self.task.quality] if evaluates else None
        grad_norm = report.grad_norm.item()
        return Metrics(
            step=self.step,
            loss=loss,
            quality=quality,
            lr=lr.item(),
            loss_scale=report.loss_scale.item(),
            skipped=int(self.scaler.skipped),
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            units_per_second=(self._units - timed_units) / max(self._seconds - timed_seconds, 1e-9),
            peak_memory_bytes=_peak_memory_bytes(self.device),
        )

    def _evaluate(self) -> dict[str, float]:
        figures = {name: float(value) for name, value in self.task.evaluate(self.model).items()}
        if self.task.quality not in figures:
            raise TaskError(
                f"task {self.task.name!r} evaluates {', '.join(figures) or 'nothing'}, but its quality is "
                f"{self.task.quality!r}; return that figure too, or name another as `quality`"
            )
        return figures

    def _check_health(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss became {loss} by step {self.step}: that is the forward pass, not the loss scale; "
                "look at the data, lower the learning rate, or keep the module that overflows in FP32 by a rule"
            )
        skipped = int(self.scaler.skipped_in_a_row)
        if skipped >= PATIENCE:
            names = [
                name
                for name, param in self.model.named_parameters()
                if param.grad is not None and not param.grad.isfinite().all()
            ]
            raise LossScaleCollapse(
                f"the last {skipped} steps were skipped although the loss is finite, at a loss scale of "
                f"{self.scaler.loss_scale.item():g}; the gradients of {_listed(names)} are not finite: use policy "
                "bf16, or keep those modules in FP32 by a rule"
            )

    def _batches(self) -> Iterator[Batch]:
        """Yield batches for ever, from where the run stands, and note where it stands then."""
        while True:
            generator = torch.Generator().manual_seed(self.settings.seed * 2**32 + self._epoch)
            epoch = iter(self.task.batches(generator))
            # drawing what was used up before must not move the random states that the checkpoint restored
            with torch.random.fork_rng(devices=[]):
                for _ in range(self._batches_taken):
                    next(epoch, None)
            for batch in epoch:
                self._batches_taken += 1
                yield batch
            if self._batches_taken == 0:
                raise TaskError(f"the data set of task {self.task.name!r} is empty: an epoch yields no batch")
            self._epoch += 1
            self._batches_taken = 0


def _optimizer(model: torch.nn.Module, settings: RunSettings) -> torch.optim.Optimizer:
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "seed": settings.seed,
        "backend": settings.backend,
    }
    match settings.optimizer:
        case "adamw":
            return dt.AdamW(model.parameters(), betas=settings.betas, **common)
        case "lion":
            return dt.Lion(model.parameters(), betas=settings.betas, **common)
        case "sgd":
            return dt.SGD(model.parameters(), momentum=settings.momentum, **common)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to_device(item, device) for key, item in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_to_device(item, device) for item in batch)
    return batch


def _peak_memory_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "no parameter"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
