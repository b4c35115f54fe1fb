"""Processes answer, die in ways that are explained, and never outlive the block."""

import os
import signal
from pathlib import Path

import pytest

from duotone.compare.arms.catalogue import CATALOGUE, Arm
from duotone.compare.failures import WorkerFailed
from duotone.compare.job import Job
from duotone.compare.processes.process import Processes
from duotone.compare.records import Trial
from duotone.errors import TaskError

TINY = str(Path(__file__).parents[1] / "tiny_task.py")


def job_of(task: str = TINY, arm: Arm = CATALOGUE["fp32"]) -> Job:
    return Job(arm, task, 0, {"device": "cpu", "steps": 40})


def is_alive(pid: int | None) -> bool:
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_process_tells_of_its_task_trains_and_dies_noticed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Processes() as processes:
        process = processes.start(log)
        subject, device_state = process.ask("inspect", job_of())
        assert (subject.name, subject.parameters, subject.micro_batch, subject.task_steps) == ("tiny", 49, 8, 40)
        assert (device_state.device, device_state.gpu) == ("cpu", None)
        with pytest.raises(TaskError, match="there is no task 'digit'; did you mean digits"):
            process.ask("inspect", job_of("digit"))
        missing = Arm("bf8", "duotone", "none", "by_duotone:build")
        with pytest.raises(WorkerFailed) as raised:
            process.ask("start", job_of(arm=missing))
        assert raised.value.failure.kind == "not possible"
        assert "Traceback" in log.read_text()
        process.ask("start", job_of())
        assert len(process.ask("take", 2).steps) == 2
        assert process.pid is not None
        # Ctrl-C in a terminal reaches it too, and is none of its business
        os.kill(process.pid, signal.SIGINT)
        assert set(process.ask("evaluate")) == {"loss"}
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="its process was killed"):
            process.ask("take", 2)
        with pytest.raises(WorkerFailed, match="its process was killed"):
            process.ask("take", 2)
    assert not is_alive(process.pid)


@pytest.mark.slow
def test_no_process_outlives_the_block_that_an_interrupt_ends(tmp_path: Path) -> None:
    pids = []

    def block() -> None:
        with Processes() as processes:
            idle, busy, unborn = (processes.start(tmp_path / name) for name in ("idle", "busy", "unborn"))
            pids.extend((idle.pid, busy.pid, unborn.pid))
            idle.send("start", job_of())
            busy.ask("start", job_of())
            idle.receive()
            # trains for longer than anybody waits
            busy.send("take", 10**9)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
    assert not any(map(is_alive, pids))
    assert len(pids) == 3


@pytest.mark.slow
def test_a_trial_measures_everything(tmp_path: Path) -> None:
    with Processes() as processes:
        trial: Trial = processes.start(tmp_path / "log").ask("try_arm", job_of(), tmp_path / "profile.json")
    assert trial.failure is None
    assert trial.phases is not None
    assert trial.units_per_step == 8
    assert trial.parameters == 49
    assert trial.bytes_per_parameter == 16
    assert trial.saved_bytes["float32"] > 8 * 16 * 4
    assert trial.start_seconds > 0
    assert trial.is_deterministic
    assert trial.peak_memory_bytes is not None
    # the model is of a few weights, and whatever the process needs once is not counted
    assert trial.peak_memory_bytes < 50e6
    assert "traceEvents" in (tmp_path / "profile.json").read_text()
