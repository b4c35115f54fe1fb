"""Every remark, and that there is none where there is nothing to remark."""

from dataclasses import replace
from pathlib import Path

import pytest

from duotone.compare.folder import ComparisonFolder
from duotone.compare.plan import Pace
from duotone.compare.report.assembly import assemble

from .made_records import SHAPES, STEPS, SUBJECT, Made, made_fit, made_folder, made_run, made_trial

FP32, AMP, BF16 = SHAPES[:3]
TWO = Made(shapes=(FP32, BF16))


def whole(folder: ComparisonFolder) -> ComparisonFolder:
    """Let a comparison's steps be all of its task's, so that nothing is left to remark."""
    folder.write(replace(SUBJECT, task_steps=STEPS))
    return folder


def remarks(folder: ComparisonFolder) -> tuple[str, ...]:
    return assemble(folder).remarks


def with_turns(folder: ComparisonFolder, count: int) -> ComparisonFolder:
    for seed in assemble(folder).plan.seeds:
        for shape in TWO.shapes:
            run = made_run(shape, seed)
            folder.write(replace(run, turns=run.turns[:count]))
    return folder


def test_nothing_to_remark(tmp_path: Path) -> None:
    assert remarks(whole(made_folder(tmp_path / "made", TWO))) == ()


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (Made(trials=2), "the comparison is not finished: 5 of 7 arms are not tried yet"),
        (Made(runs=7), "the comparison is not finished: 11 of 18 runs have not ended yet"),
        (replace(TWO, seeds=(0,)), "there is one seed: qualities cannot be tested, and differences may be chance"),
        (
            replace(TWO, seeds=(0, 1)),
            "with two seeds, only large or very regular differences of quality can be distinguished from chance",
        ),
        (Made(shapes=(FP32,)), "fp32 is the only arm, and has nothing to be compared with"),
        (
            replace(TWO, together=False),
            "arms ran one after the other, for they do not fit into memory together: what changed on the machine "
            "meanwhile is part of their speeds",
        ),
    ],
)
def test_each_by_itself(tmp_path: Path, made: Made, text: str) -> None:
    assert remarks(whole(made_folder(tmp_path / "made", made))) == (text,)


@pytest.mark.parametrize("turns", [1, 2])
def test_a_single_round(tmp_path: Path, turns: int) -> None:
    folder = with_turns(whole(made_folder(tmp_path / "made", replace(TWO, seeds=(0,)))), turns)
    assert remarks(folder)[1:] == (
        "speeds come from a single round: nothing is known of how far they can be relied on",
    )


def test_too_few_rounds_for_the_confidence(tmp_path: Path) -> None:
    folder = whole(made_folder(tmp_path / "made", TWO))
    assert remarks(with_turns(folder, 2)) == (
        "speeds come from 3 rounds: their interval is all of the range, which holds the median with 75 % confidence, "
        "not 95 %",
    )
    # six rounds are enough
    assert remarks(with_turns(folder, 3)) == ()


def test_fewer_steps_than_the_tasks_own(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "made", TWO)
    assert remarks(folder) == (
        "runs have 240 of the task's own 1,400 steps, and 17 of its 100 steps of warm-up; qualities are "
        "those of so short a training",
    )
    folder.write(Pace(STEPS, 100, 10, True))
    assert remarks(folder) == (
        "runs have 240 of the task's own 1,400 steps; qualities are those of so short a training",
    )


def test_an_evaluation_that_is_not_deterministic(tmp_path: Path) -> None:
    folder = whole(made_folder(tmp_path / "made", TWO))
    for shape in TWO.shapes:
        folder.write(replace(made_trial(shape), is_deterministic=False))
    assert remarks(folder) == (
        "evaluating fp32 and bf16 twice gave two results: the task's evaluation is not deterministic, and a part of "
        "the differences in quality is its own",
    )


def test_a_model_too_small_for_its_memory_to_mean_much(tmp_path: Path) -> None:
    folder = whole(made_folder(tmp_path / "made", TWO))
    trial = folder.trials()["fp32"]
    folder.write(replace(trial, peak_memory_bytes=49_000_000))
    (remark,) = remarks(folder)
    assert remark.startswith("fp32 takes 49.0 MB at its peak")
    folder.write(replace(trial, peak_memory_bytes=51_000_000))
    assert remarks(folder) == ()


def test_versions_that_changed_between_trials(tmp_path: Path) -> None:
    folder = whole(made_folder(tmp_path / "made", TWO))
    for shape, version in zip(TWO.shapes, ("1.0", "1.1"), strict=True):
        folder.write(replace(made_trial(shape), versions={"optimi": version}))
    assert remarks(folder) == ("optimi changed its version between trials: 1.0 and 1.1",)


def test_largest_batches_that_are_not_found_yet(tmp_path: Path) -> None:
    folder = whole(made_folder(tmp_path / "made", replace(TWO, fits=True)))
    assert remarks(folder) == ()
    (folder.path / "fits" / "bf16.json").unlink()
    assert remarks(folder) == ("the largest micro-batch of bf16 is not found yet",)
    folder.write(made_fit(BF16))
    assert remarks(folder) == ()


def test_seeds_that_ran_at_another_time_than_the_baseline(tmp_path: Path) -> None:
    folder = whole(made_folder(tmp_path / "made", TWO))
    folder.write(replace(made_run(BF16, 1), session="later"))
    assert remarks(folder) == (
        "bf16 ran at another time than fp32 with some seeds, after an interruption: those rounds have no part in how "
        "many times faster it is",
    )
    folder.write(replace(made_run(FP32, 1), session="later"))
    assert remarks(folder) == ()


def test_arms_that_ran_one_after_the_other_are_not_said_to_be_apart(tmp_path: Path) -> None:
    folder = whole(made_folder(tmp_path / "made", replace(TWO, together=False)))
    folder.write(replace(made_run(BF16, 1), session="later"))
    (remark,) = remarks(folder)
    assert remark.startswith("arms ran one after the other")
