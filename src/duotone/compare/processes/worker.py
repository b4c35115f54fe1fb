"""What runs in a process of its own: it answers the requests that come through a pipe, one after the other.

The process ends when the pipe is closed, so it outlives its parent by no more than the steps of one request.
What it prints goes to a file.
"""

import gc
import math
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from duotone.compare.fit.micro_batches import resized
from duotone.compare.job import Job
from duotone.compare.measuring.arm_trainer import ArmTrainer, report_failure
from duotone.compare.measuring.batches import endless_batches
from duotone.compare.measuring.device_state import DeviceState, read_device_state
from duotone.compare.measuring.footprint import Footprint, begin_footprint
from duotone.compare.measuring.notes import Notes
from duotone.compare.measuring.process_warm_up import warm_up_process
from duotone.compare.measuring.trial import timed_steps, try_arm
from duotone.compare.measuring.turn import Turn
from duotone.compare.records import Trial, median_phases
from duotone.compare.subject import Subject
from duotone.errors import TaskError
from duotone.train import Task, find_device
from duotone.train.task import samples_in


@dataclass(frozen=True)
class BatchMeasurement:
    """A micro-batch that was trained with.

    Attributes:
        peak_memory_bytes: as in `Trial`.
        units_per_second: of the median step.
    """

    peak_memory_bytes: int | None
    units_per_second: float


class Worker:
    """The requests: a method for each, whose result is the answer.

    Args:
        started: when the process was started, in the seconds of `time.time()`.
    """

    def __init__(self, started: float) -> None:
        self._started = started
        self._notes = Notes()
        self._trainer: ArmTrainer | None = None
        warnings.showwarning = self._notes.add

    def inspect(self, job: Job) -> tuple[Subject, DeviceState]:
        """Build the task, and return what it is and where it would be trained.

        Raises:
            TaskError: it cannot be built or is empty, a setting cannot be, or the device is not there.
        """
        task, settings = job.open()
        device = find_device(settings.device)
        if device.type not in ("cpu", "cuda"):
            raise TaskError(f'device "{device}" can be trained on, but not timed here; compare on cpu or cuda')
        subject = Subject(
            name=task.name,
            quality=task.quality,
            lower_is_better=task.lower_is_better,
            unit=task.unit,
            parameters=_trainable(task),
            baselines=dict(task.baselines),
            facts=dict(task.facts),
            task_steps=settings.steps,
            task_warmup_steps=settings.warmup_steps,
            micro_batch=_micro_batch(task),
        )
        return subject, read_device_state(device)

    def try_arm(self, job: Job, profile_path: Path | None, limit_seconds: float = math.inf) -> Trial:
        """Train a little and measure.

        Raises:
            TaskError: the task is at fault.
        """
        trainer, footprint = self._measured_trainer(job)
        start_seconds = time.time() - self._started
        trial = try_arm(trainer, job.arm, footprint, profile_path, limit_seconds)
        return replace(trial, start_seconds=start_seconds, notes=self._notes.lines)

    def start(self, job: Job) -> None:
        """Build what `take` and `evaluate` train and judge."""
        task, settings = job.open()
        self._trainer = ArmTrainer(job.arm, task, settings, _current_device(settings.device))
        gc.collect()
        # what exists now stays, so the collections before every turn may leave it out
        gc.freeze()

    def take(self, steps: int) -> Turn:
        """Take the next steps."""
        return self._started_trainer().take(steps)

    def evaluate(self) -> dict[str, float]:
        """Return the figures of the model as it is."""
        return self._started_trainer().evaluate()

    def notes(self) -> tuple[str, ...]:
        """Return what was warned of."""
        return self._notes.lines

    def measure(self, job: Job, micro_batch: int) -> BatchMeasurement:
        """Train a little with a micro-batch of so many samples."""
        trainer, footprint = self._measured_trainer(job, micro_batch)
        steps = timed_steps(trainer, footprint)
        step_seconds = median_phases([step.phases for step in steps]).step
        units = sum(step.units for step in steps) / len(steps)
        return BatchMeasurement(footprint.peak_bytes(), units / step_seconds)

    def _measured_trainer(self, job: Job, micro_batch: int | None = None) -> tuple[ArmTrainer, Footprint]:
        task, settings = job.open()
        device = _current_device(settings.device)
        # data that a task loads with its first batch are not counted as memory of training
        next(endless_batches(task, settings.seed))
        warm_up_process(job.arm, settings, device)
        footprint = begin_footprint(task.model, device)
        if micro_batch is not None:
            task = resized(task, micro_batch)
        return ArmTrainer(job.arm, task, settings, device), footprint

    def _started_trainer(self) -> ArmTrainer:
        if self._trainer is None:
            raise RuntimeError("start must be requested before take and evaluate")
        return self._trainer


def work(connection: Connection, log: Path, started: float) -> None:
    """Answer requests until the other end closes; this is the process's whole life.

    A request is a pair of a method's name and its arguments, an answer a pair of "done" and its result, "failed" and
    a `Failure`, or "refused" and the message of a `TaskError`.
    """
    # Ctrl-C reaches every process of a terminal; the parent ends this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _print_to(log)
    worker = Worker(started)
    # the parent process has closed the pipe, or is dead
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            name, arguments = connection.recv()
            connection.send(_answer(worker, name, arguments))


def _answer(worker: Worker, name: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "done", getattr(worker, name)(*arguments)
    except TaskError as error:
        return "refused", str(error)
    except Exception as error:
        return "failed", report_failure(error)


def _print_to(log: Path) -> None:
    """Send what this process prints to a file, what libraries print past Python too."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)
    os.close(descriptor)


def _current_device(name: str) -> torch.device:
    """Return the device of that name; a GPU is torch's current one from here on, for events are recorded there."""
    device = find_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _trainable(task: Task) -> int:
    parameters = (each for each in task.model.parameters() if each.requires_grad and not is_lazy(each))
    return sum(each.numel() for each in parameters)


def _micro_batch(task: Task) -> int:
    batch = next(endless_batches(task, 0))
    try:
        return samples_in(batch)
    except TaskError:
        # batches of another kind, which the task counts by itself
        return 0
