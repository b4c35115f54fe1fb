"""The arms of one seed, trained side by side: in every round each takes a turn, which is a few steps in a row.

The order rotates from round to round, so that what changes on the machine, its clock or its load, affects all alike.
"""

from collections.abc import Sequence
from itertools import count
from typing import TypeVar
from uuid import uuid4

from duotone.compare.folder import ComparisonFolder
from duotone.compare.job import Job
from duotone.compare.plan import Pace
from duotone.compare.processes.arm_process import ArmProcess
from duotone.compare.processes.process import Processes
from duotone.compare.watcher import Watcher

Value = TypeVar("Value")


def train_in_turns(jobs: Sequence[Job], pace: Pace, folder: ComparisonFolder, watcher: Watcher) -> None:
    """Train all jobs to the end, or to their failures, and write the record of each when it has ended.

    Raises:
        TaskError: the task is at fault; what has ended before is written.
    """
    session = uuid4().hex
    with Processes() as processes:
        running = []
        for job in jobs:
            watcher.run_begins(job.arm.name, job.seed)
            log = folder.log_path(job.arm.name, f"seed{job.seed}")
            running.append(ArmProcess(job, processes.start(log), pace, session))
        for arm in running:
            arm.wait()
            _keep_if_ended(arm, folder, watcher)
        for number in count():
            left = [arm for arm in rotated(running, number) if arm.run is None]
            if not left:
                return
            for arm in left:
                turn = arm.take_turn()
                if turn is not None and turn.steps:
                    watcher.turn_ends(arm.job.arm.name, arm.job.seed, arm.step, turn.loss, turn.phases.step)
                _keep_if_ended(arm, folder, watcher)


def rotated(values: Sequence[Value], number: int) -> list[Value]:
    """Return the values, starting with another one for each number.

    >>> [rotated("abc", number) for number in range(3)]
    [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b']]
    """
    start = number % len(values) if values else 0
    return [*values[start:], *values[:start]]


def _keep_if_ended(arm: ArmProcess, folder: ComparisonFolder, watcher: Watcher) -> None:
    if arm.run is not None:
        folder.write(arm.run)
        watcher.run_ends(arm.run)
