"""A comparison from its plan to its report: inspect the task, try every arm, set the pace, train seed by seed, fit.

This process trains nothing and never starts CUDA; whatever touches a model runs in a process of its own. What has been
measured is written at once, so an interruption loses what is unfinished and no more.
"""

import math
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from duotone.compare.arms.catalogue import Arm
from duotone.compare.environment import describe
from duotone.compare.failures import RETRYABLE, WorkerFailed
from duotone.compare.fit.fit_arm import fit_arm
from duotone.compare.folder import ComparisonFolder
from duotone.compare.job import Job, job_of
from duotone.compare.measuring.device_state import DeviceState
from duotone.compare.pacing import pace_of, too_slow
from duotone.compare.plan import Pace, Plan
from duotone.compare.processes.process import Processes
from duotone.compare.processes.turns import rotated, train_in_turns
from duotone.compare.records import Fit, Run, Trial
from duotone.compare.report.publish import publish
from duotone.compare.report.report import Report
from duotone.compare.subject import Subject
from duotone.compare.watcher import SilentWatcher, Watcher
from duotone.errors import CompareError
from duotone.own_folder import locked
from duotone.train import stop_on_signal

# what no measurement depends on
_FREE = frozenset({"max_slowdown", "margin", "confidence", "argv"})


def compare(plan: Plan, path: Path, *, resume: bool = False, watcher: Watcher | None = None) -> Report:
    """Make a comparison, or go on with one, and return its report.

    Every trial and every run is a process of its own; none outlives this call. They are started as multiprocessing's
    "spawn" does it, so a script that calls this needs `if __name__ == "__main__":` around the call. An arm that fails
    is a row of the report with its reason, and the others go on.

    On resume, what was measured is kept, the pace too. Trials, runs and searches that failed with an "error", "out of
    memory" or "not installed" are tried again; those of the other kinds would fail again, and are kept. Arms of a seed
    that had not ended start again from the first step.

    Args:
        plan: what is compared. On resume it must be the folder's own, which `ComparisonFolder(path).plan()` returns,
            but for more seeds, another `max_slowdown`, and what qualities are judged by, `margin` and `confidence`.
        path: the comparison's folder.
        resume: go on with the comparison that is there.
        watcher: receives every event; None for no one.

    Raises:
        CompareError: the folder is taken, or holds no comparison or another one, or one of another machine or task, or
            cannot be written to.
        TaskError: the task or its settings cannot be used, whichever arm trains it. A new comparison leaves no folder
            then, unless it comes out in training.
        FolderError: another process compares in the folder, or it cannot be written to.
        KeyboardInterrupt: at Ctrl-C, SIGTERM and SIGHUP, with the signal's name; what has ended is kept, `resume` goes
            on.

    >>> import tempfile
    >>> from duotone.compare.arms.catalogue import find_arms
    >>> plan = Plan("stdlib-text:tiny", find_arms("fp32,bf16"), baseline="fp32", seeds=(0,), steps=20)
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
    ...     report = compare(plan, Path(folder, "comparison"))
    ...     [(arm.name, arm.bytes_per_parameter) for arm in report.arms]
    [('fp32', 16.0), ('bf16', 14.0)]
    """
    folder = ComparisonFolder(path)
    with _signals_as_interrupts():
        comparison = _Comparison(plan, folder, watcher or SilentWatcher())
        if resume:
            _check_goes_on(plan, folder)
        else:
            folder.check_free()
        with locked(path):
            if resume:
                folder.write(plan)
            comparison.run(resume)
            return publish(folder)


class _Comparison:
    """One call of `compare`."""

    def __init__(self, plan: Plan, folder: ComparisonFolder, watcher: Watcher) -> None:
        self._plan = plan
        self._folder = folder
        self._watcher = watcher
        self._started = time.monotonic()

    def run(self, resume: bool) -> None:
        plan, folder = self._plan, self._folder
        self._watcher.begins(plan)
        pace = folder.pace()
        subject, device_state = self._inspect()
        environment = describe(device_state, plan.task)
        if resume:
            _check_same_circumstances(folder, subject, environment)
        else:
            folder.start(plan)
        folder.write(subject)
        folder.write_environment(folder.environment() or environment)
        trials = self._try_arms()
        if pace is None and trials:
            seconds_gone = time.monotonic() - self._started
            pace = pace_of(plan, subject, trials.values(), device_state, seconds_gone)
            folder.write(pace)
        if pace is not None:
            self._train(list(trials), pace)
        if plan.fit_memory_bytes is not None:
            self._fit(list(trials), subject, plan.fit_memory_bytes)

    def _inspect(self) -> tuple[Subject, DeviceState]:
        plan = self._plan
        with tempfile.TemporaryDirectory() as scratch, Processes() as processes:
            log = Path(scratch, "log")
            job = Job(plan.arms[0], plan.task, plan.seeds[0], dict(plan.settings))
            try:
                return processes.start(log).ask("inspect", job)
            except WorkerFailed as error:
                printed = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
                last = f" ({printed[-1]})" if printed and printed[-1] not in error.failure.reason else ""
                raise CompareError(f"task {plan.task} could not be built: {error.failure.reason}{last}") from error

    def _try_arms(self) -> dict[str, Trial]:
        """Make the trials that are missing; return those of arms that can be run, in the plan's order."""
        plan = self._plan
        trials = {arm: trial for arm, trial in self._folder.trials().items() if not _is_retryable(trial)}
        # "too slow" is in comparison with the baseline
        order = sorted(plan.arms, key=lambda arm: arm.name != plan.baseline)
        in_doubt = []
        for arm in order:
            is_new = arm.name not in trials
            if is_new:
                self._watcher.trial_begins(arm.name)
                trials[arm.name] = self._try_arm(arm, trials.get(plan.baseline))
            trials[arm.name] = trial = self._judged(trials[arm.name], trials.get(plan.baseline))
            if is_new and trial.phases is not None and trial.failure is not None:
                in_doubt.append(arm)
            else:
                self._end_trial(trial)
        for arm in in_doubt:
            # the machine may have been busy just then: the quicker of two trials counts, the second after all others
            again = self._judged(self._try_arm(arm, trials[plan.baseline]), trials[plan.baseline])
            if again.failure is None:
                trials[arm.name] = again
            self._end_trial(trials[arm.name])
        return {arm.name: trials[arm.name] for arm in plan.arms if trials[arm.name].failure is None}

    def _judged(self, trial: Trial, baseline: Trial | None) -> Trial:
        """Return a trial with "too slow" as its failure where it is that, and without where it is not."""
        if trial.failure is None or trial.failure.kind == "too slow":
            return replace(trial, failure=too_slow(trial, baseline, self._plan.max_slowdown))
        return trial

    def _end_trial(self, trial: Trial) -> None:
        self._folder.write(trial)
        self._watcher.trial_ends(trial)

    def _try_arm(self, arm: Arm, baseline: Trial | None) -> Trial:
        job = job_of(self._plan, arm, self._plan.seeds[0])
        profile_path = self._folder.profile_path(arm.name) if self._plan.profile else None
        of_baseline = None if baseline is None else baseline.phases
        limit_seconds = math.inf if of_baseline is None else self._plan.max_slowdown * of_baseline.step
        try:
            with Processes() as processes:
                return processes.start(self._folder.log_path(arm.name, "trial")).ask(
                    "try_arm", job, profile_path, limit_seconds
                )
        except WorkerFailed as error:
            return Trial(arm.name, error.failure)

    def _train(self, names: list[str], pace: Pace) -> None:
        plan = self._plan
        ended = {key for key, run in self._folder.runs().items() if not _is_retryable(run)}
        arms = [arm for arm in plan.arms if arm.name in names]
        left = {seed: [arm for arm in arms if (arm.name, seed) not in ended] for seed in plan.seeds}
        self._watcher.paced(pace, sum(map(len, left.values())))
        for number, (seed, some) in enumerate(left.items()):
            jobs = [job_of(plan, arm, seed, pace) for arm in rotated(some, number)]
            for group in [jobs] if pace.together else [[job] for job in jobs]:
                train_in_turns(group, pace, self._folder, self._watcher)

    def _fit(self, names: list[str], subject: Subject, limit_bytes: int) -> None:
        done = {name for name, fit in self._folder.fits().items() if not _is_retryable(fit)}
        for arm in self._plan.arms:
            if arm.name in names and arm.name not in done:
                job = job_of(self._plan, arm, self._plan.seeds[0])
                fit = fit_arm(job, subject.micro_batch, limit_bytes, self._folder, self._watcher)
                self._folder.write(fit)
                self._watcher.fit_ends(fit)


def _is_retryable(record: Trial | Run | Fit) -> bool:
    return record.failure is not None and record.failure.kind in RETRYABLE


def _check_goes_on(plan: Plan, folder: ComparisonFolder) -> None:
    """Raise unless what was measured under the plan that is in the folder is a part of this one."""
    there = folder.plan()
    if set(there.seeds) <= set(plan.seeds):
        there = replace(there, seeds=plan.seeds)
    for name in vars(there).keys() - _FREE:
        before, after = getattr(there, name), getattr(plan, name)
        if _as_json(before) != _as_json(after):
            raise CompareError(
                f"{folder.path} is a comparison with {name} {_shown(before)}, not {_shown(after)}; resume it "
                "without changing that, or start a new one in another --out"
            )


def _check_same_circumstances(folder: ComparisonFolder, subject: Subject, environment: Mapping[str, str]) -> None:
    """Raise unless what is in the folder was measured on the same task, machine and versions."""
    before = folder.subject()
    if before is not None and before != subject:
        raise CompareError(
            f"task {subject.name} is not the one that {folder.path} compares: it has changed; start a new comparison "
            "in another --out"
        )
    for name, value in folder.environment().items():
        if name != "date" and environment.get(name) != value:
            raise CompareError(
                f"{folder.path} was measured with {name} {value}, and here it is {environment.get(name, 'none')}; "
                "figures of both do not mix: start a new comparison in another --out, and show both by --diff"
            )


def _as_json(value: Any) -> bytes:
    # a tuple comes back from a file as a list
    return msgspec.json.encode(value, enc_hook=dict, order="sorted")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(item.name if isinstance(item, Arm) else str(item) for item in value)
    return str(value)


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C or the first SIGTERM or SIGHUP in the block, so that processes are ended."""

    def interrupt() -> None:
        raise KeyboardInterrupt(interruption.cause.name if interruption.cause is not None else "")

    # only the main thread may set handlers
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with stop_on_signal(interrupt) as interruption:
        yield
