"""The arms of a seed take turns in an order that rotates, and each end is written at once."""

from pathlib import Path

import pytest

from duotone.compare.arms.catalogue import CATALOGUE
from duotone.compare.folder import ComparisonFolder
from duotone.compare.job import Job
from duotone.compare.plan import Pace
from duotone.compare.processes.turns import train_in_turns
from duotone.errors import TaskError

from ..scripted import Script, Witness, scripted

ARMS = ("fp32", "bf16", "fp16")
TINY, FAULTY = (str(Path(__file__).parents[1] / name) for name in ("tiny_task.py", "faulty_task.py"))


def entries_of(*arms: str, seed: int = 0, task: str = TINY) -> list[Job]:
    return [Job(CATALOGUE[arm], task, seed, {"device": "cpu"}) for arm in arms]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return scripted(monkeypatch)


def test_turns_rotate_and_the_last_is_shorter(script: Script, tmp_path: Path) -> None:
    witness, folder = Witness(), ComparisonFolder(tmp_path)
    train_in_turns(entries_of(*ARMS), Pace(8, 1, 3, together=True), folder, witness)
    turns = [(arm, step) for arm, _, step, _, _ in witness.of("turn_ends")]
    assert turns == [
        *(("fp32", 3), ("bf16", 3), ("fp16", 3)),
        *(("bf16", 6), ("fp16", 6), ("fp32", 6)),
        *(("fp16", 8), ("fp32", 8), ("bf16", 8)),
    ]
    # all models are there before the first turn
    assert [name for name, _ in script.asked[:4]] == ["start", "start", "start", "take"]
    runs = folder.runs()
    assert {run.steps for run in runs.values()} == {8}
    assert runs["bf16", 0].evaluation == {"loss": 0.25}
    assert runs["bf16", 0].notes == ("a note",)
    assert script.ended == 3


def test_no_turn_is_one_step_alone_with_cold_caches(script: Script, tmp_path: Path) -> None:
    witness = Witness()
    train_in_turns(entries_of("fp32"), Pace(7, 1, 3, together=True), ComparisonFolder(tmp_path), witness)
    assert [step for _, _, step, _, _ in witness.of("turn_ends")] == [3, 7]


def test_one_that_fails_is_written_and_the_others_go_on(script: Script, tmp_path: Path) -> None:
    script.fail("take", "bf16 0", "out of memory")
    script.fail("start", "fp16 0", "not possible")
    witness, folder = Witness(), ComparisonFolder(tmp_path)
    train_in_turns(entries_of(*ARMS), Pace(6, 1, 3, together=True), folder, witness)
    runs = folder.runs()
    assert {arm: run.failure and run.failure.kind for (arm, _), run in runs.items()} == {
        "fp32": None,
        "bf16": "out of memory",
        "fp16": "not possible",
    }
    assert [run.arm for (run,) in witness.of("run_ends")] == ["fp16", "bf16", "fp32"]
    assert script.asked_for("take") == ["fp32 0", "bf16 0", "fp32 0"]


def test_a_fault_of_the_task_ends_them_all(script: Script, tmp_path: Path) -> None:
    script.errors["evaluate", "fp32 0"] = TaskError("no quality")
    with pytest.raises(TaskError, match="no quality"):
        train_in_turns(entries_of(*ARMS), Pace(3, 1, 3, together=True), ComparisonFolder(tmp_path), Witness())


@pytest.mark.slow
def test_arms_fail_in_their_own_ways_beside_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    jobs = [*entries_of("fp32", task=FAULTY)]
    for seed in range(3):
        jobs += entries_of("bf16", seed=seed, task=FAULTY)
    folder = ComparisonFolder(tmp_path)
    train_in_turns(jobs, Pace(8, 1, 4, together=True), folder, Witness())
    runs = folder.runs()
    assert runs["fp32", 0].failure is None
    assert runs["fp32", 0].steps == 8
    raised, died, nan = (runs["bf16", seed] for seed in range(3))
    assert raised.failure is not None
    assert (raised.failure.kind, raised.failure.reason) == ("error", "RuntimeError: the third loss")
    assert raised.steps == 2
    assert "is never computed" in folder.log_path("bf16", "seed0").read_text()
    assert died.failure is not None
    assert (died.failure.kind, died.steps) == ("out of memory", 0)
    assert nan.failure is not None
    assert (nan.failure.kind, nan.failure.reason) == ("not finite", "the loss became nan by step 3")
