"""Training an arm a few steps at a time, measured: batches in, times, losses and loss scales out.

A step is as in `duotone.train.Trainer`: draw a batch, forward, backward, for each micro-batch, then update. What it
takes counts from the drawing of its first batch. Losses, scales and skips stay on the device until the steps that were
asked for are done, so a step waits for the device only where the arm itself does.
"""

import gc
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duotone.compare.arms.build import build
from duotone.compare.arms.catalogue import Arm
from duotone.compare.arms.stepper import Assignment, Stepper
from duotone.compare.failures import failure_of
from duotone.compare.measuring.batches import endless_batches
from duotone.compare.measuring.clock import StepClock
from duotone.compare.measuring.turn import Step, Turn
from duotone.compare.records import Failure
from duotone.errors import ArmError, TaskError
from duotone.train import Compilation, RunSettings, Task
from duotone.train.task import check_loss, figures_of, on_device


class ArmTrainer:
    """Takes the steps of one arm on one task.

    Attributes:
        task: what is trained; its model may be changed in place.
        settings: how.
        device: where.
        stepper: what takes the steps.
        compilation: what compiling the model took so far, where the arm compiles.

    Args:
        arm: whose stepper is built.
        task: fresh.
        settings: of the run.
        device: that is there.

    Raises:
        ArmError: the arm cannot train this here.

    >>> from duotone.compare.arms.catalogue import CATALOGUE
    >>> from duotone.train import built_in_task, resolve_settings
    >>> task = built_in_task("stdlib-text:tiny")
    >>> trainer = ArmTrainer(CATALOGUE["bf16"], task, resolve_settings(task.settings), torch.device("cpu"))
    >>> turn = trainer.take(3)
    >>> len(turn.steps), turn.steps[0].units, turn.failure
    (3, 256.0, None)
    """

    def __init__(self, arm: Arm, task: Task, settings: RunSettings, device: torch.device) -> None:
        self.task = task
        self.settings = settings
        self.device = device
        self.stepper: Stepper = build(Assignment(arm, task, settings, device))
        try:
            self.compilation = Compilation(self.stepper.model if arm.compiles else None, device)
        except TaskError as error:
            # the arm is at fault, and others go on
            raise ArmError(str(error)) from error
        self._batches = endless_batches(task, settings.seed)
        self._clock = StepClock(device)

    def take(self, steps: int) -> Turn:
        """Take some steps; an error ends them and is the turn's failure, with its traceback printed.

        Raises:
            TaskError: the task is at fault, whichever arm trains it.
        """
        steps_done: list[tuple[float, list[Tensor], Any, Any]] = []
        failure = None
        gc.collect()
        # a collection takes as long as a step, and would be counted as one arm's time
        gc.disable()
        started, compiled = time.perf_counter(), self.compilation.seconds
        try:
            for _ in range(steps):
                steps_done.append(self._step())
        except TaskError:
            raise
        except Exception as error:
            failure = report_failure(error)
        finally:
            gc.enable()
        try:
            read = self._read(steps_done)
        except Exception as error:
            # an error on the device is raised when a result is read
            read, failure = (), failure or report_failure(error)
        compile_seconds = self.compilation.seconds - compiled
        return Turn(read, time.perf_counter() - started - compile_seconds, failure, compile_seconds)

    def evaluate(self) -> dict[str, float]:
        """Return the task's figures of the model as it is.

        Raises:
            TaskError: they are no numbers by name, or the figure that stands for quality is not among them.
        """
        with self.stepper.evaluating(), self.compilation.evaluating():
            return figures_of(self.task, self.task.evaluate(self.stepper.model))

    def batch(self) -> Any:
        """Draw a micro-batch and return it on the device."""
        return on_device(next(self._batches), self.device)

    def _step(self) -> tuple[float, list[Tensor], Any, Any]:
        losses, units = [], 0.0
        self._clock.begin()
        for _ in range(self.settings.micro_batches):
            batch = self.batch()
            units += float(self.task.units_in(batch))
            self._clock.lap("")
            loss = self.stepper.forward(batch)
            self._clock.lap("forward")
            check_loss(self.task, loss)
            self.stepper.backward(loss)
            self._clock.lap("backward")
            losses.append(loss.detach())
        update = self.stepper.update()
        self._clock.lap("update")
        return units, losses, update.loss_scale, update.skipped

    def _read(self, steps: Sequence[tuple[float, list[Tensor], Any, Any]]) -> tuple[Step, ...]:
        phases = self._clock.read()
        each = 2 + self.settings.micro_batches
        values = _numbers([value for _, losses, *rest in steps for value in (*rest, *losses)])
        rows = [values[start : start + each] for start in range(0, len(values), each)]
        return tuple(
            Step(seconds, units, loss=sum(losses), loss_scale=scale, skipped=bool(skipped))
            for seconds, (units, *_), (scale, skipped, *losses) in zip(phases, steps, rows, strict=True)
        )


def report_failure(error: Exception) -> Failure:
    """Print an error's traceback, and return what it means."""
    traceback.print_exception(error, file=sys.stderr)
    return failure_of(error)


def _numbers(values: Sequence[Any]) -> list[float]:
    """Return tensors of one element and plain numbers as plain numbers, with one wait for the device."""
    tensors = [value.reshape(()).double() for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]
