"""A clock for the parts of steps: of the processor's time on a CPU, of the device's own on CUDA.

On CUDA a lap is an event in the stream, read once all steps are taken: nothing waits inside a step, and what a step
costs is what the device needed, the waiting for its launches included.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from duotone.compare.records import Phases

_PARTS = ("forward", "backward", "update")


class StepClock:
    """Times steps part by part.

    >>> clock = StepClock(torch.device("cpu"))
    >>> clock.begin()
    >>> clock.lap("forward")
    >>> clock.lap("backward")
    >>> clock.lap("update")
    >>> [step] = clock.read()
    >>> step.step >= step.forward + step.backward + step.update
    True
    """

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._now: Callable[[], Any] = _event if is_cuda else time.perf_counter
        self._between: Callable[[Any, Any], float] = _event_seconds if is_cuda else _seconds
        # of each step, when it began, and its parts with their ends
        self._steps: list[tuple[Any, list[tuple[str, Any]]]] = []

    def begin(self) -> None:
        """Begin a step; what happens until the first lap that has a part's name belongs to the whole alone."""
        self._steps.append((self._now(), []))

    def lap(self, part: str) -> None:
        """End a part: "forward", "backward", "update", or "" for what is none of them; it began at the lap before."""
        self._steps[-1][1].append((part, self._now()))

    def read(self) -> list[Phases]:
        """Return the seconds of the steps that ended with an update, and forget all; on CUDA, wait for the device."""
        whole = [(begun, laps) for begun, laps in self._steps if laps and laps[-1][0] == "update"]
        self._steps = []
        return [self._phases(begun, laps) for begun, laps in whole]

    def _phases(self, begun: Any, laps: list[tuple[str, Any]]) -> Phases:
        parts: dict[str, float] = dict.fromkeys((*_PARTS, ""), 0.0)
        before = begun
        for part, now in laps:
            parts[part] += self._between(before, now)
            before = now
        return Phases(step=self._between(begun, before), **{part: parts[part] for part in _PARTS})


def _seconds(before: float, after: float) -> float:
    return after - before


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _event_seconds(before: torch.cuda.Event, after: torch.cuda.Event) -> float:
    after.synchronize()
    return before.elapsed_time(after) / 1e3
