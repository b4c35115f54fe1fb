"""The arms of one seed, trained side by side: each takes a few steps, then it is the next one's turn.

The order rotates from round to round, so that whatever drifts on the machine, its clock or its load, hits all alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import TypeVar
from uuid import uuid4

from duotone.compare.entry import Entry
from duotone.compare.folder import ComparisonFolder
from duotone.compare.plan import Pace
from duotone.compare.processes.process import Processes
from duotone.compare.processes.racer import Racer
from duotone.compare.watcher import Watcher

Value = TypeVar("Value")


def train_in_turns(entries: Sequence[Entry], pace: Pace, folder: ComparisonFolder, watcher: Watcher) -> None:
    """Train all entries to the end, or to their failures, and write each one's record when it has ended.

    Raises:
        TaskError: the task is at fault; what has ended before is written.
    """
    session = uuid4().hex
    with Processes() as processes:
        racers = []
        for entry in entries:
            watcher.run_begins(entry.arm.name, entry.seed)
            log = folder.log_path(entry.arm.name, f"seed{entry.seed}")
            racers.append(Racer(entry, processes.start(log), pace))
        for racer in racers:
            racer.wait()
            _tell_end(racer, session, folder, watcher)
        for number in count():
            running = [racer for racer in rotated(racers, number) if racer.run is None]
            if not running:
                return
            for racer in running:
                turn = racer.take_turn()
                if turn is not None and turn.steps:
                    arm, seed = racer.entry.arm.name, racer.entry.seed
                    watcher.turn_ends(arm, seed, racer.step, turn.loss, turn.phases.step)
                _tell_end(racer, session, folder, watcher)


def rotated(values: Sequence[Value], number: int) -> list[Value]:
    """Return the values from another one on, each in its turn.

    >>> [rotated("abc", number) for number in range(3)]
    [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b']]
    """
    start = number % len(values) if values else 0
    return [*values[start:], *values[:start]]


def _tell_end(racer: Racer, session: str, folder: ComparisonFolder, watcher: Watcher) -> None:
    if racer.run is not None:
        run = replace(racer.run, session=session)
        folder.write(run)
        watcher.run_ends(run)
