"""Two comparisons beside each other: figures, what may account for them, and what cannot be compared."""

from dataclasses import replace

import pytest

from duotone.compare.plan import Pace
from duotone.compare.report.assembly import assemble
from duotone.compare.report.diff import difference
from duotone.compare.report.report import Report, Spread
from duotone.errors import CompareError

from .made_records import Made, made_folder


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return assemble(made_folder(tmp_path_factory.mktemp("made") / "whole", Made(seeds=(0, 1))))


@pytest.fixture(scope="module")
def second(first: Report) -> Report:
    """The same on a machine that is twice as fast, where BF16 gains more, with another torch and an arm renamed."""
    arms = []
    for arm in first.arms[:-1]:
        changes = {}
        if arm.step_seconds is not None:
            changes["step_seconds"] = Spread(*(value / 2 for value in vars(arm.step_seconds).values()))
        if arm.name == "bf16":
            assert arm.times_faster is not None
            assert arm.quality is not None
            changes["times_faster"] = Spread(*(value * 1.5 for value in vars(arm.times_faster).values()))
            changes["peak_memory_bytes"] = 88_000_000
            changes["quality"] = Spread(*(value + 0.01 for value in vars(arm.quality).values()))
            changes["quality_verdict"] = "undecided"
        arms.append(replace(arm, **changes))
    arms.append(replace(first.arms[-1], name="mine"))
    environment = {**first.environment, "torch": "2.14.0", "gpu": "Example"}
    return replace(first, arms=tuple(arms), environment=environment)


def test_a_comparison_beside_itself_differs_in_nothing(first: Report) -> None:
    found = difference(first, first)
    assert (found.circumstances, found.only_first, found.only_second, found.remarks) == ({}, (), (), ())
    for row in found.arms:
        assert row.changes.get("quality", 0.0) == 0.0
        assert {change for key, change in row.changes.items() if key != "quality"} <= {1.0}


def test_figures_are_the_second_over_the_first(first: Report, second: Report) -> None:
    found = difference(first, second)
    assert [row.first.name for row in found.arms] == [arm.name for arm in first.arms[:-1]]
    assert (found.only_first, found.only_second) == (("fp16-no-scaling",), ("mine",))
    rows = {row.first.name: row for row in found.arms}
    bf16 = rows["bf16"].changes
    assert rows["fp32"].changes["step"] == bf16["step"] == 0.5
    assert rows["fp32"].changes["times_faster"] == 1.0
    assert bf16["times_faster"] == pytest.approx(1.5)
    assert bf16["peak_memory"] == 0.8
    assert bf16["quality"] == pytest.approx(0.01)
    assert rows["bf16"].first is first.arms[2]
    assert rows["bf16"].second is second.arms[2]
    assert rows["lightning-bf16"].changes == {}
    assert found.circumstances == {"torch": ("2.13.0", "2.14.0"), "gpu": ("", "Example")}
    assert found.remarks == ()


def test_higher_may_be_better(first: Report, second: Report) -> None:
    reports = [replace(report, subject=replace(report.subject, lower_is_better=False)) for report in (first, second)]
    assert difference(*reports).arms[2].changes["quality"] == pytest.approx(-0.01)


def test_another_task_is_an_error(first: Report) -> None:
    for change in ({"name": "digits"}, {"quality": "nll"}, {"lower_is_better": False}):
        other = replace(first, subject=replace(first.subject, **change))
        with pytest.raises(CompareError, match="the comparisons are of stdlib-text by bits_per_byte and of"):
            difference(first, other)


def test_other_steps_and_settings_are_remarks(first: Report) -> None:
    plan = replace(
        first.plan, settings={"learning_rate": 0.1, "device": "cpu"}, minutes=3.0, steps=7, argv=("duotone",)
    )
    found = difference(first, replace(first, plan=plan, pace=Pace(480, 34, 10, True)))
    assert found.circumstances == {"steps": ("240", "480"), "warmup_steps": ("17", "34"), "learning_rate": ("", "0.1")}
    assert found.remarks == (
        "learning_rate, steps and warmup_steps differ: qualities are not comparable between the two",
    )


def test_another_data_set_baseline_or_rule_are_remarks(first: Report) -> None:
    facts = {**first.subject.facts, "training": "other files"}
    plan = replace(first.plan, baseline="bf16", margin=0.02)
    other = replace(first, subject=replace(first.subject, facts=facts, parameters=7), plan=plan, is_complete=False)
    found = difference(first, other)
    assert set(found.circumstances) == {"parameters", "training", "baseline", "margin"}
    assert found.remarks == (
        "parameters and training differ: qualities are not comparable between the two",
        "parameters and training differ: a step is not the same work in both",
        "the baselines differ: how many times faster an arm is does not mean the same in both",
        "margin or confidence differ: the verdicts on quality have different rules",
        "the second comparison is not finished",
    )
    assert difference(other, first).remarks[-1] == "the first comparison is not finished"


def test_without_a_pace_there_are_fewer_circumstances(first: Report) -> None:
    found = difference(first, replace(first, pace=None))
    assert found.circumstances["turn_steps"] == ("10", "")
