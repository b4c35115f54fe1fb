"""A comparison tries, paces, trains and fits; it survives what goes wrong, and goes on where it was interrupted."""

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duotone.compare import ComparisonFolder, Pace, Phases, Plan, Trial, assemble, compare
from duotone.compare.arms.catalogue import find_arms
from duotone.compare.comparison import _signals_as_interrupts
from duotone.compare.job import job_of
from duotone.compare.measuring.arm_trainer import ArmTrainer
from duotone.compare.processes.run_record import run_record
from duotone.errors import CompareError, TaskError

from .scripted import SUBJECT, Script, Witness, scripted

TINY = str(Path(__file__).with_name("tiny_task.py"))


def plan_of(arms: str = "fp32,bf16,fp16", **changes: object) -> Plan:
    settings = {"baseline": "fp32", "seeds": (0, 1), "settings": {"device": "cpu"}, **changes}
    return Plan(TINY, find_arms(arms), **settings)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return scripted(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "comparison"


def test_a_comparison_goes_from_trials_to_a_report(script: Script, path: Path) -> None:
    witness = Witness()
    # the baseline is tried first, wherever it stands
    report = compare(plan_of("bf16,fp32,fp16"), path, watcher=witness)
    assert script.asked_for("try_arm") == ["fp32", "bf16", "fp16"]
    starts = ["bf16 0", "fp32 0", "fp16 0", "fp32 1", "fp16 1", "bf16 1"]
    assert script.asked_for("start") == starts
    assert [arm.name for arm in report.arms] == ["bf16", "fp32", "fp16"]
    assert report.is_complete
    assert report.subject.name == "tiny"
    assert report.environment["device"] == "cpu"
    [(pace, runs_left)] = witness.of("paced")
    assert (pace, runs_left) == (report.pace, 6)
    assert pace.steps == 40
    names = [name for name, *_ in witness.events]
    assert names[0] == "begins"
    assert names.count("trial_ends") == 3
    assert names.count("run_ends") == 6


def test_arms_that_do_not_fit_together_run_one_after_the_other(script: Script, path: Path) -> None:
    script.free_bytes = 10**9
    report = compare(plan_of(), path)
    assert report.pace is not None
    assert not report.pace.together
    assert [name for name, _ in script.asked if name in ("start", "evaluate")] == ["start", "evaluate"] * 6


def test_slow_and_failed_arms_keep_their_trials_and_are_not_run(script: Script, path: Path) -> None:
    script.step_seconds["fp16"] = 2.0
    script.fail("try_arm", "bf16", "not possible")
    report = compare(plan_of(), path)
    assert script.asked_for("start") == ["fp32 0", "fp32 1"]
    trials = ComparisonFolder(path).trials()
    assert trials["fp16"].failure is not None
    assert trials["fp16"].failure.kind == "too slow"
    assert trials["fp16"].phases is not None
    assert [arm.failure and arm.failure.kind for arm in report.arms] == [None, "not possible", "too slow"]


def test_one_trial_on_a_busy_machine_removes_no_arm(script: Script, path: Path) -> None:
    witness, times = Witness(), iter([2.0, 0.2])
    script.step_seconds_of["fp16"] = lambda: next(times)
    compare(plan_of(), path, watcher=witness)
    # the second time after all the others
    assert script.asked_for("try_arm") == ["fp32", "bf16", "fp16", "fp16"]
    trial = ComparisonFolder(path).trials()["fp16"]
    assert trial.failure is None
    assert trial.phases is not None
    assert trial.phases.step == 0.2
    assert [arm.arm for (arm,) in witness.of("trial_ends")] == ["fp32", "bf16", "fp16"]
    assert "fp16 0" in script.asked_for("start")


def test_without_the_baseline_the_rest_goes_on(script: Script, path: Path) -> None:
    script.fail("try_arm", "fp32", "error")
    script.step_seconds["fp16"] = 20.0
    compare(plan_of(seeds=(0,), steps=20), path)
    assert script.asked_for("start") == ["bf16 0", "fp16 0"]


def test_without_any_arm_there_is_a_report_all_the_same(script: Script, path: Path) -> None:
    for arm in ("fp32", "bf16", "fp16"):
        script.fail("try_arm", arm, "not possible")
    report = compare(plan_of(), path)
    assert report.pace is None
    assert script.asked_for("start") == []


def test_a_task_that_cannot_be_built_leaves_no_folder(script: Script, path: Path) -> None:
    script.errors["inspect", "fp32"] = TaskError("there is no task")
    with pytest.raises(TaskError, match="there is no task"):
        compare(plan_of(), path)
    assert not path.exists()
    script.fail("inspect", "fp32", "out of memory")
    with pytest.raises(CompareError, match="could not be built: it is out of memory"):
        compare(plan_of(), path)


def test_a_folder_belongs_to_one_comparison(script: Script, path: Path) -> None:
    compare(plan_of(), path)
    with pytest.raises(CompareError, match="holds another comparison; choose another --out"):
        compare(plan_of(), path)
    with pytest.raises(CompareError, match="a comparison with seeds 0, 1, not 0; resume it without changing that"):
        compare(plan_of(seeds=(0,)), path, resume=True)
    with pytest.raises(CompareError, match="a comparison with arms fp32, bf16, fp16, not fp32, bf16"):
        compare(plan_of("fp32,bf16"), path, resume=True)
    with pytest.raises(CompareError, match="holds no comparison"):
        compare(plan_of(), path.with_name("other"), resume=True)


def test_what_may_pass_is_tried_again_and_the_pace_is_kept(script: Script, path: Path) -> None:
    script.fail("try_arm", "bf16", "not installed")
    script.fail("take", "fp32 1", "not finite")
    script.fail("take", "fp16 0", "error")
    first = compare(plan_of(), path)
    script.errors.clear()
    script.asked.clear()
    script.step_seconds["bf16"] = 0.5
    witness = Witness()
    report = compare(ComparisonFolder(path).plan(), path, resume=True, watcher=witness)
    assert script.asked_for("inspect") == ["fp32"]
    assert script.asked_for("try_arm") == ["bf16"]
    assert [trial.arm for (trial,) in witness.of("trial_ends")] == ["fp32", "bf16", "fp16"]
    assert script.asked_for("start") == ["bf16 0", "fp16 0", "bf16 1"]
    assert report.pace == first.pace
    assert [runs for _, runs in witness.of("paced")] == [3]


def test_another_machine_or_task_is_not_gone_on_with(
    script: Script, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(plan_of(), path)
    before = {file: file.read_bytes() for file in path.rglob("*.json")}
    folder = ComparisonFolder(path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "3.0.0")
        with pytest.raises(CompareError, match=r"was measured with torch 2.*, and here it is 3\.0\.0"):
            compare(folder.plan(), path, resume=True)
    assert {file: file.read_bytes() for file in path.rglob("*.json")} == before
    folder.write(replace(SUBJECT, parameters=50))
    with pytest.raises(CompareError, match=r"task tiny is not the one that .* it has changed"):
        compare(folder.plan(), path, resume=True)


def test_an_edited_task_file_is_not_gone_on_with(script: Script, path: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text("lr = 1")
    compare(replace(plan_of(), task=str(task)), path)
    # by itself the path is the same, and so is all that the task says of itself
    compare(ComparisonFolder(path).plan(), path, resume=True)
    before = {file: file.read_bytes() for file in path.rglob("*.json")}
    task.write_text("lr = 2")
    with pytest.raises(CompareError, match=r"was measured with task file .*task\.py, SHA-256 \w{16}, and here it is "):
        compare(ComparisonFolder(path).plan(), path, resume=True)
    assert {file: file.read_bytes() for file in path.rglob("*.json")} == before


def test_speeds_are_of_rounds_that_were_run_together(script: Script, path: Path) -> None:
    compare(plan_of(), path)
    folder = ComparisonFolder(path)
    sessions = {run.seed: run.session for run in folder.runs().values()}
    assert len(set(sessions.values())) == 2
    assert all(run.session == sessions[run.seed] for run in folder.runs().values())
    for seed in sessions:
        folder.write(replace(folder.runs()["bf16", seed], session="another"))
    report = assemble(folder)
    speeds = {arm.name: arm.times_faster for arm in report.arms}
    assert speeds["bf16"] is None
    assert speeds["fp16"] is not None
    assert any(remark.startswith("bf16 ran at another time than fp32") for remark in report.remarks)


def test_who_goes_on_may_ask_for_more(script: Script, path: Path) -> None:
    script.step_seconds["fp16"] = 3.0
    first = compare(plan_of(), path)
    assert [arm.failure.kind for arm in first.arms if arm.failure is not None] == ["too slow"]
    script.asked.clear()
    more = replace(ComparisonFolder(path).plan(), seeds=(0, 1, 2), max_slowdown=40.0, margin=0.5)
    report = compare(more, path, resume=True)
    assert script.asked_for("try_arm") == []
    assert sorted(script.asked_for("start")) == ["bf16 2", "fp16 0", "fp16 1", "fp16 2", "fp32 2"]
    assert [arm.seeds for arm in report.arms] == [3, 3, 3]
    assert report.plan == ComparisonFolder(path).plan() == more


def test_fits_are_searched_once_for_arms_that_run(script: Script, path: Path) -> None:
    script.fail("try_arm", "fp16", "not possible")
    plan = plan_of(fit_memory_bytes=50_000)
    report = compare(plan, path)
    fits = [arm.fit for arm in report.arms]
    assert fits[0] is not None
    assert fits[0].micro_batch in (48, 49)
    assert fits[2] is None
    script.asked.clear()
    compare(plan, path, resume=True)
    assert script.asked == [("inspect", "fp32")]


def test_an_interrupt_before_the_pace_goes_on_with_the_trials_that_are_left(script: Script, path: Path) -> None:
    script.errors["try_arm", "fp16"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compare(plan_of(), path)
    script.errors.clear()
    script.asked.clear()
    report = compare(plan_of(), path, resume=True)
    assert script.asked_for("try_arm") == ["fp16"]
    assert report.is_complete


def test_sigterm_is_an_interrupt_once() -> None:
    before = signal.getsignal(signal.SIGTERM)

    put_away: list[str] = []

    def terminated() -> None:
        with _signals_as_interrupts():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                # while everything is put away, another one changes nothing
                os.kill(os.getpid(), signal.SIGTERM)
                put_away.append("all")

    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        terminated()
    assert put_away == ["all"]
    assert signal.getsignal(signal.SIGTERM) is before


class Interrupting(Witness):
    """Presses Ctrl-C in the middle of the second seed."""

    def turn_ends(self, arm: str, seed: int, step: int, loss: float, step_seconds: float) -> None:
        """Press it."""
        if seed == 1 and step > 10:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_comparison_that_was_interrupted_ends_as_one_that_was_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan, folder = plan_of("fp32,bf16", steps=30), ComparisonFolder(path)
    folder.start(plan)
    folder.write(Pace(30, 3, 4, together=True))
    for arm in plan.arms:
        folder.write(Trial(arm.name, phases=Phases(0.1, 0, 0, 0)))
    with pytest.raises(KeyboardInterrupt):
        compare(plan, path, resume=True, watcher=Interrupting())
    assert multiprocessing.active_children() == []
    assert {seed for _, seed in folder.runs()} == {0}
    witness = Witness()
    report = compare(plan, path, resume=True, watcher=witness)
    assert multiprocessing.active_children() == []
    assert witness.of("trial_begins") == []
    assert sorted(witness.of("run_begins")) == [("bf16", 1), ("fp32", 1)]
    assert report.is_complete
    assert report.pace is not None
    for (name, seed), run in folder.runs().items():
        arm = next(arm for arm in plan.arms if arm.name == name)
        task, settings = job_of(plan, arm, seed, report.pace).open()
        trainer = ArmTrainer(arm, task, settings, torch.device("cpu"))
        expected = run_record(name, seed, [trainer.take(30)], evaluation=trainer.evaluate())
        by_chance = {"turns": (), "seconds": 0.0, "notes": (), "session": ""}
        assert replace(run, **by_chance) == replace(expected, **by_chance)
