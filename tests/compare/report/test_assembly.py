"""From records to a report, in every state that a comparison's folder can be in."""

import math
import shlex
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from duotone.compare.folder import ComparisonFolder
from duotone.compare.plan import Pace
from duotone.compare.records import Failure
from duotone.compare.report.assembly import assemble
from duotone.compare.report.report import ArmResult, Report, Spread
from duotone.errors import CompareError

from .made_records import (
    ENVIRONMENT,
    PARAMETERS,
    SHAPES,
    STEPS,
    SUBJECT,
    TURN_STEPS,
    Made,
    made_fit,
    made_folder,
    made_plan,
    made_run,
    made_trial,
)

FP32, AMP, BF16, FP16 = SHAPES[:4]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return assemble(made_folder(tmp_path_factory.mktemp("made") / "whole", Made(fits=True)))


def named(report: Report, name: str) -> ArmResult:
    return next(arm for arm in report.arms if arm.name == name)


def test_a_whole_comparison(report: Report) -> None:
    assert report.is_complete
    assert (report.subject, report.pace) == (SUBJECT, Pace(STEPS, 17, TURN_STEPS, True))
    assert report.plan == made_plan(Made(fits=True))
    assert report.environment == ENVIRONMENT
    assert [arm.name for arm in report.arms] == [shape.arm.name for shape in SHAPES]
    assert report.baseline is report.arms[0]
    assert report.baseline.times_faster is report.baseline.worse_by is None
    assert report.baseline.quality_verdict == "not tested"
    assert report.baseline.memory_ratio == 1.0
    assert [arm.quality_verdict for arm in report.arms] == [
        "not tested", "no worse", "no worse", "no worse", "not tested", "worse", "worse",
    ]  # fmt: skip


def test_the_command_that_repeats_it_is_the_one_that_was_typed(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "a b", Made(runs=0))
    (show,) = assemble(folder).commands
    assert shlex.split(show) == ["duotone", "compare", "--show", str(folder.path)]
    argv = ("duotone", "compare", "my task.py", "--arm", "wide=bf16; head: grad=float32", "--margin", "2%")
    folder.write(replace(folder.plan(), argv=argv))
    repeat, again = assemble(folder).commands
    assert again == show
    assert tuple(shlex.split(repeat)) == argv


def test_an_arms_figures_are_those_of_its_records(report: Report) -> None:
    arm, runs = named(report, "fp16"), [made_run(FP16, seed) for seed in (0, 1, 2)]
    steps = [turn.step for run in runs for turn in run.turns[1:]]
    assert arm.step_seconds is not None
    assert arm.phases is not None
    assert arm.step_seconds.value == arm.phases.step == statistics.median(steps)
    assert arm.phases.update == statistics.median(turn.update for run in runs for turn in run.turns[1:])
    assert arm.units_per_second == 2048 / arm.step_seconds.value
    qualities = [run.evaluation["bits_per_byte"] for run in runs]
    assert arm.quality == Spread(statistics.fmean(qualities), min(qualities), max(qualities))
    assert arm.evaluation["bits_per_byte"] == arm.quality
    assert set(arm.evaluation) == {"bits_per_byte", "accuracy"}
    assert arm.worse_by is not None
    assert arm.worse_by.value == pytest.approx(0.002, abs=0.002)
    assert (arm.seeds, arm.skipped, arm.loss_scale) == (3, 2.0, 16384.0)
    assert arm.memory["tails"] == 2 * PARAMETERS
    assert (arm.bytes_per_parameter, arm.saved_bytes, arm.peak_memory_bytes) == (14.0, 34_000_000, 112_000_000)
    assert arm.memory_ratio == 0.56
    assert arm.notes == FP16.notes
    assert arm.fit is not None
    assert arm.fit.micro_batch == 88
    curve = arm.curves[1]
    assert (curve.seed, curve.losses, curve.skipped) == (1, runs[1].losses, (3, 90))
    assert curve.step_seconds == statistics.median(turn.step for turn in runs[1].turns[1:])


def test_speed_is_taken_round_by_round(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "made", Made(shapes=(FP32, BF16), seeds=(0, 1)))
    # rounds that differ by a factor of a thousand, in both arms alike, are no difference between the arms
    for shape in (FP32, BF16):
        for seed in (0, 1):
            run = made_run(shape, seed)
            drifted = tuple(
                replace(turn, step=turn.step * 1000 ** (number % 2)) for number, turn in enumerate(run.turns)
            )
            folder.write(replace(run, turns=drifted))
    figure = assemble(folder).arms[1].times_faster
    assert figure is not None
    assert 1.68 < figure.lower < figure.value < figure.upper < 1.77
    every = [
        theirs.step / ours.step
        for seed in (0, 1)
        for theirs, ours in zip(made_run(FP32, seed).turns[1:], made_run(BF16, seed).turns[1:], strict=True)
    ]
    assert figure.value == pytest.approx(statistics.median(every), rel=1e-12)


@pytest.mark.parametrize("together", [True, False])
def test_a_seed_of_another_session_has_no_part_in_the_speed(tmp_path: Path, together: bool) -> None:
    folder = made_folder(tmp_path / "made", Made(shapes=(FP32, BF16), together=together))
    before = assemble(folder).arms[1].times_faster
    run = made_run(BF16, 1)
    quick = tuple(replace(turn, step=turn.step / 10) for turn in run.turns)
    folder.write(replace(run, turns=quick, session="later"))
    figure = assemble(folder).arms[1].times_faster
    assert before is not None
    assert figure is not None
    # arms that ran one after the other have no session in common, and every seed counts
    assert (figure.upper < 2) == together
    assert (figure.lower, figure.upper) != (before.lower, before.upper)


def test_a_run_that_failed_keeps_what_it_had(report: Report) -> None:
    arm = named(report, "fp16-no-scaling")
    assert arm.failure == Failure("not finite", "the loss is nan at step 120 (seed 0; seeds 1 and 2 too)")
    assert arm.times_faster is not None
    assert (arm.seeds, arm.quality, arm.skipped, arm.quality_verdict) == (0, None, None, "worse")
    # the pair after the last finite one says where it broke
    assert [len(curve.losses) for curve in arm.curves] == [25, 25, 25]
    assert all(step == 120 and math.isnan(loss) for step, loss in (curve.losses[-1] for curve in arm.curves))
    missing = named(report, "lightning-bf16")
    assert missing.failure == SHAPES[4].failure
    assert (missing.step_seconds, missing.phases, missing.curves, missing.bytes_per_parameter) == (None, None, (), 0.0)


def test_a_plan_alone_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    folder = ComparisonFolder(tmp_path / "made")
    with pytest.raises(CompareError, match="holds no comparison; start one"):
        assemble(folder)
    folder.start(made_plan(Made()))
    with pytest.raises(CompareError, match=r"no measurement; go on with duotone compare --resume --out .*made"):
        assemble(folder)


def test_before_the_first_trial_every_figure_is_empty(tmp_path: Path) -> None:
    report = assemble(made_folder(tmp_path / "made", Made(trials=0)))
    assert not report.is_complete
    assert report.pace is None
    assert report.verdicts == ()
    for arm in report.arms:
        assert arm.failure is arm.step_seconds is arm.quality is arm.peak_memory_bytes is arm.memory_ratio is None
        assert (arm.quality_verdict, arm.curves, arm.notes, arm.fit) == ("not tested", (), (), None)


def test_trials_alone_give_times_and_memory(tmp_path: Path) -> None:
    report = assemble(made_folder(tmp_path / "made", Made(runs=0)))
    arm = named(report, "bf16")
    assert arm.phases is not None
    assert arm.phases == made_trial(BF16).phases
    assert arm.step_seconds == Spread(arm.phases.step, arm.phases.step, arm.phases.step)
    assert arm.memory_ratio == 0.55
    assert arm.times_faster is arm.quality is arm.skipped is arm.loss_scale is None
    assert not report.is_complete


@pytest.mark.parametrize("runs", [1, 2, 6, 11, 17])
def test_some_runs_give_figures_and_no_test(tmp_path: Path, runs: int) -> None:
    report = assemble(made_folder(tmp_path / "made", Made(runs=runs)))
    assert not report.is_complete
    arm = named(report, "fp32")
    assert arm.seeds == -(-runs // 6)
    bf16 = named(report, "bf16")
    assert (bf16.times_faster is None) == (runs < 3)
    # all of the first arms' runs have ended before the last arm's
    assert bf16.quality_verdict == ("no worse" if runs == 17 else "not tested")
    assert (bf16.worse_by is None) == (runs < 9)


def test_the_last_run_makes_it_complete(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "made", Made(runs=17))
    assert not assemble(folder).is_complete
    folder.write(made_run(SHAPES[-1], 2))
    assert assemble(folder).is_complete


@pytest.mark.parametrize("kind", ["out of memory", "not possible", "error", "too slow", "not finite"])
def test_one_failed_run_of_three_is_reported_with_its_seed(tmp_path: Path, kind: str) -> None:
    folder = made_folder(tmp_path / "made", Made(shapes=(FP32, BF16)))
    folder.write(replace(made_run(BF16, 1), failure=Failure(kind, "it is so"), evaluation={}))
    arm = assemble(folder).arms[1]
    assert arm.failure == Failure(kind, "it is so (seed 1)")
    assert arm.seeds == 2
    assert arm.quality is not None
    assert arm.quality_verdict == ("worse" if kind == "not finite" else "not tested")
    assert (arm.worse_by is None) == (kind == "not finite")
    # another end is no divergence, and its curve just ends
    assert [math.isnan(curve.losses[-1][1]) for curve in arm.curves] == [False, kind == "not finite", False]


def test_seeds_that_failed_for_another_reason_are_not_counted_with_the_first(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "made", Made(shapes=(FP32, BF16)))
    for seed, kind in enumerate(("error", "out of memory", "error")):
        folder.write(replace(made_run(BF16, seed), failure=Failure(kind, "it is so")))
    assert assemble(folder).arms[1].failure == Failure("error", "it is so (seed 0; seed 2 too)")


def test_a_failure_of_the_only_seed_needs_no_seeds(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "made", Made(shapes=(FP32, BF16), seeds=(4,)))
    folder.write(replace(made_run(BF16, 4), failure=Failure("error", "it broke")))
    assert assemble(folder).arms[1].failure == Failure("error", "it broke")


def test_a_trial_that_was_too_slow_keeps_its_figures(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "made", Made(shapes=(FP32, FP16), runs=0))
    folder.write(replace(made_trial(FP16), failure=Failure("too slow", "a step takes 17 times fp32's")))
    for seed in (0, 1, 2):
        folder.write(made_run(FP32, seed))
    report = assemble(folder)
    assert report.is_complete
    assert report.arms[1].failure == Failure("too slow", "a step takes 17 times fp32's")
    assert report.arms[1].phases == made_trial(FP16).phases
    assert report.arms[1].memory_ratio == 0.56


def test_a_baseline_that_failed_leaves_the_others_their_own_figures(tmp_path: Path) -> None:
    failed = replace(FP32, failure=Failure("out of memory", "16 GB were not enough"))
    report = assemble(made_folder(tmp_path / "made", Made(shapes=(failed, BF16))))
    assert report.is_complete
    arm = report.arms[1]
    assert arm.times_faster is arm.memory_ratio is arm.worse_by is None
    assert arm.quality_verdict == "not tested"
    assert arm.quality is not None


def test_a_finished_run_without_a_finite_quality_is_worse(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "made", Made(shapes=(FP32, BF16)))
    folder.write(replace(made_run(BF16, 2), evaluation={"bits_per_byte": math.nan}))
    arm = assemble(folder).arms[1]
    assert arm.quality_verdict == "worse"
    assert arm.quality is not None
    assert math.isnan(arm.quality.value)


def test_versions_join_the_environment_and_records_of_other_arms_are_left_out(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "made", Made(shapes=(FP32, BF16)))
    folder.write(replace(made_trial(BF16), versions={"torchao": "0.18"}))
    folder.write(replace(made_trial(FP16), arm="stranger", versions={"strange": "1"}))
    report = assemble(folder)
    assert report.environment == {**ENVIRONMENT, "torchao": "0.18"}
    assert [arm.name for arm in report.arms] == ["fp32", "bf16"]


def test_notes_of_trial_and_runs_come_once(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "made", Made(shapes=(FP32, BF16)))
    folder.write(replace(made_trial(BF16), notes=("a", "b")))
    folder.write(replace(made_run(BF16, 0), notes=("b", "c", "a")))
    assert assemble(folder).arms[1].notes == ("a", "b", "c")


def test_the_remark_of_a_search_is_a_note(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "made", Made(shapes=(FP32, BF16), fits=True))
    folder.write(replace(made_fit(BF16), remark="88 samples fit; more were not tried"))
    assert [arm.notes for arm in assemble(folder).arms] == [(), ("88 samples fit; more were not tried",)]
