"""The command lines that repeat a comparison and show it again."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from duotone.compare.arms.catalogue import CATALOGUE
from duotone.compare.plan import Pace, Plan

_SETTINGS = "settings.yaml"


def commands(plan: Plan, pace: Pace | None, path: Path) -> tuple[str, ...]:
    """Return what to type to repeat a comparison with the same steps, and to show it.

    Seeds that do not count from 0, which the command line has no word for, are repeated from Python only: there is no
    line for them.

    Args:
        plan: what was asked for.
        pace: the steps that it came to, if they are decided.
        path: its folder.
    """
    show = f"duotone compare --show {shlex.quote(str(path))}"
    if plan.seeds != tuple(range(len(plan.seeds))):
        return (show,)
    settings = {name: value for name, value in plan.settings.items() if name != "device"}
    repeat = shlex.join(["duotone", "compare", plan.task, *_flags(plan, pace)])
    if not settings:
        return repeat, show
    # what has no flag goes through a file; JSON is YAML as well
    write = f"echo {shlex.quote(json.dumps(settings))} > {_SETTINGS}"
    return write, f"{repeat} --config {_SETTINGS}", show


def _flags(plan: Plan, pace: Pace | None) -> Iterator[str]:
    own = {arm.name: arm.policy for arm in plan.arms if arm.name not in CATALOGUE and arm.policy is not None}
    named = [arm.name for arm in plan.arms if arm.name not in own]
    if named:
        yield from ("--arms", ",".join(named))
    for name, policy in own.items():
        yield from ("--arm", f"{name}={policy}")
    yield from ("--baseline", plan.baseline, "--seeds", str(len(plan.seeds)))
    steps = plan.steps if pace is None else pace.steps
    yield from ("--minutes", f"{plan.minutes:g}") if steps is None else ("--steps", str(steps))
    yield from ("--margin", f"{100 * plan.margin:g}%", "--confidence", f"{100 * plan.confidence:g}%")
    if "device" in plan.settings:
        yield from ("--device", str(plan.settings["device"]))
    yield from ("--max-slowdown", f"{plan.max_slowdown:g}")
    if plan.fit_memory_bytes is not None:
        yield from ("--fit-memory", _size(plan.fit_memory_bytes))
    if plan.profile:
        yield "--profile"


def _size(number: int) -> str:
    """Return bytes in the largest unit that leaves no fraction.

    >>> _size(2_000_000_000), _size(1_048_576)
    ('2GB', '1048576B')
    """
    units = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}
    unit = next(unit for unit, size in units.items() if number % size == 0)
    return f"{number // units[unit]}{unit}"
