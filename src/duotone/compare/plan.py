"""What is compared and how, and how many steps its trials allow.

Both are kept in its folder, so that it can go on after an interruption with the same figures.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from duotone.compare.arms.catalogue import Arm
from duotone.errors import CompareError


@dataclass(frozen=True)
class Plan:
    """What is compared, and how it is judged.

    Attributes:
        task: a built-in task's name, or the path of a task file.
        arms: the ways of training, each name once.
        baseline: the name of the arm that the others are compared with.
        seeds: each arm trains once with each.
        steps: optimizer steps of each run; None for as many as fit into `minutes`, and at most the task's own.
        minutes: how long the whole may take, where `steps` is None.
        settings: run settings that go before the task's own (`learning_rate`, `device`, ...), steps and seed apart.
        margin: how much worse than the baseline's mean a quality may be, as a fraction of it.
        confidence: of intervals and tests.
        max_slowdown: an arm whose trial step takes this many times the baseline's is not trained to the end.
        fit_memory_bytes: find each arm's largest micro-batch that fits into this much memory; None not to.
        profile: write a profiler trace of one step of each arm.
        argv: the command that asked for it, as it was typed; empty where Python or an older version did.

    Raises:
        CompareError: there is no arm or no seed, a name is taken twice, the baseline is none of the arms, or a number
            is out of range.
    """

    task: str
    arms: tuple[Arm, ...]
    baseline: str
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    minutes: float = 8.0
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    margin: float = 0.01
    confidence: float = 0.95
    max_slowdown: float = 10.0
    fit_memory_bytes: int | None = None
    profile: bool = False
    argv: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        twice = next((name for name in names if names.count(name) > 1), None)
        if not names:
            raise CompareError("there is no arm to compare; name some, such as fp32,bf16")
        if twice is not None:
            raise CompareError(f'there are two arms called "{twice}"; name each once')
        if self.baseline not in names:
            raise CompareError(f'the baseline "{self.baseline}" is none of the arms ({", ".join(names)}); choose one')
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise CompareError(f"the seeds are {list(self.seeds)}; there must be at least one, and each once")
        self._require("steps", self.steps is None or 1 <= self.steps <= 2**53, "at least 1 and at most 2^53")
        self._require("minutes", 0 < self.minutes < math.inf, "positive and finite")
        self._require("margin", 0 < self.margin < 1, "above 0 and below 1, such as 0.01, which is 1%")
        self._require("confidence", 0.5 <= self.confidence < 1, "from 0.5 to below 1, such as 0.95, which is 95%")
        self._require("max_slowdown", self.max_slowdown > 1, "above 1")
        self._require("fit_memory_bytes", self.fit_memory_bytes is None or self.fit_memory_bytes > 0, "positive")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise CompareError(f"{name} is {getattr(self, name)}; it must be {allowed}")


@dataclass(frozen=True)
class Pace:
    """How the runs go, decided once after the trials.

    Attributes:
        steps: optimizer steps of each run.
        warmup_steps: of the schedule: the task's own, or a quarter of `steps` if that is less.
        turn_steps: steps that an arm takes before it is the next one's turn.
        together: whether all arms of a seed are in memory at the same time and take turns; else they run one after
            the other.
    """

    steps: int
    warmup_steps: int
    turn_steps: int
    together: bool
