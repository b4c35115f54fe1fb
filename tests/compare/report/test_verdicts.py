"""Every sentence that an arm can get."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duotone.compare.plan import Plan
from duotone.compare.records import Failure
from duotone.compare.report.assembly import assemble
from duotone.compare.report.report import ArmResult, Report, Spread
from duotone.compare.report.verdicts import rules, verdicts

from .made_records import SHAPES, SUBJECT, Made, made_folder, made_plan

FINE = ", margin 0.0241)"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return assemble(made_folder(tmp_path_factory.mktemp("made") / "whole"))


def said(report: Report, name: str, **changes: Any) -> list[str]:
    """Return what is said of one arm, with some of its figures changed, beside the baseline alone."""
    arms = [report.baseline, *(replace(arm, **changes) for arm in report.arms if arm.name == name)]
    return [
        line for line in verdicts(report.subject, report.plan, arms) if line.startswith((f"{name} is ", name + ":"))
    ]


def test_all_of_a_comparison(report: Report) -> None:
    expected = [
        ("bf16 is the policy to use here", ""),
        ("bf16 is faster than fp32 by 1.7", FINE),
        ("fp16 is slower than fp32 by 1.05", FINE),
        ("torch-amp-bf16 is faster than fp32 by 1.5", FINE),
        ("bf16-no-masters: worse (3.01", "against 2.4103): this is what master weights are for"),
        ("lightning-bf16 was not run: lightning is not installed; ", "pip install lightning"),
        ("fp16-no-scaling did not stay finite: the loss is nan", "; this is what loss scaling is for"),
    ]
    assert len(report.verdicts) == len(expected)
    for line, (start, end) in zip(report.verdicts, expected, strict=True):
        assert line.startswith(start)
        assert line.endswith(end)


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Spread(1.72, 1.66, 1.79), "bf16 is faster than fp32 by 1.72 (1.66 to 1.79), takes"),
        (Spread(0.95, 0.92, 0.98), "bf16 is slower than fp32 by 1.05 (1.02 to 1.09), takes"),
        (Spread(1.02, 0.99, 1.05), "bf16 is not distinguishable from fp32 in speed: 1.02 (0.99 to 1.05), takes"),
    ],
)
def test_speed(report: Report, figure: Spread, text: str) -> None:
    assert said(report, "bf16", times_faster=figure)[-1].startswith(text)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (0.55, "), takes 0.55 of its memory, and its bits_per_byte"),
        (1.2, "), takes 1.20 times its memory, and its bits_per_byte"),
        (1.0, "), takes as much memory, and its bits_per_byte"),
        (None, "), and its bits_per_byte"),
    ],
)
def test_memory(report: Report, ratio: float | None, text: str) -> None:
    assert text in said(report, "bf16", memory_ratio=ratio)[-1]


QUALITY = Spread(2.4012, 2.39, 2.41)


@pytest.mark.parametrize(
    ("verdict", "worse_by", "text"),
    [
        (
            "no worse",
            Spread(0.001, -0.005, 0.0069),
            "its bits_per_byte is no worse (2.4012 against 2.4103; at most 0.0069 worse with 95 % confidence",
        ),
        (
            "no worse",
            Spread(-0.01, -0.02, -0.002),
            "its bits_per_byte is no worse (2.4012 against 2.4103; at least 0.0020 better with 95 % confidence",
        ),
        (
            "no worse",
            Spread(0, 0, 0),
            "its bits_per_byte is no worse (2.4012 against 2.4103; the same with every seed)",
        ),
        (
            "worse",
            Spread(0.6, 0.55, 0.65),
            "its bits_per_byte is worse (2.4012 against 2.4103; at least 0.5500 worse with 95 % confidence",
        ),
        (
            "undecided",
            Spread(0.01, -0.0012, 0.03),
            "whether its bits_per_byte is worse is undecided (2.4012 against 2.4103; "
            "from 0.0012 better to 0.0300 worse, each with 95 % confidence",
        ),
        ("not tested", None, "its bits_per_byte is 2.4012 against 2.4103, not tested"),
        ("worse", None, "its bits_per_byte is worse: it is not finite"),
    ],
)
def test_quality(report: Report, verdict: str, worse_by: Spread | None, text: str) -> None:
    line = said(report, "bf16", quality=QUALITY, quality_verdict=verdict, worse_by=worse_by)[-1]
    assert f"and {text}" in line
    has_margin = worse_by is not None and worse_by.upper != 0
    assert line.endswith(FINE if has_margin else text)


def test_an_arm_without_runs_has_no_sentence(report: Report) -> None:
    assert said(report, "bf16", times_faster=None, quality=None) == []
    assert said(report, "bf16", quality=None)[-1].endswith("of its memory")


@pytest.mark.parametrize(
    ("policy", "verdict", "text"),
    [
        ("bf16-true,rounding=nearest", "worse", "this is what master weights are for"),
        ("bf16-true,rounding=nearest", "no worse", "the updates of this task are large enough to go without master"),
        ("bf16-true,rounding=stochastic", "worse", "stochastic rounding does not stand in for master weights here"),
        ("bf16-true,rounding=stochastic", "no worse", "stochastic rounding stands in for master weights here"),
        ("fp16,loss_scale=1", "worse", "this is what loss scaling is for"),
        ("fp16,loss_scale=1", "no worse", "the gradients of this task are large enough for FP16 as they are"),
    ],
)
def test_ablations_say_what_they_show(report: Report, policy: str, verdict: str, text: str) -> None:
    changes = {"policy": policy, "quality_verdict": verdict, "quality": QUALITY}
    arms = [replace(arm, **changes) if arm.name == "bf16-no-masters" else arm for arm in report.arms]
    if "stochastic" in policy:
        # it stands in for masters only where rounding to nearest does not do
        nearest = next(arm for arm in report.arms if arm.name == "bf16-no-masters")
        arms.append(replace(nearest, name="nearest", policy="bf16-true,rounding=nearest", quality_verdict="worse"))
    (line,) = [line for line in verdicts(report.subject, report.plan, arms) if line.startswith("bf16-no-masters:")]
    assert line.startswith(f"bf16-no-masters: {verdict} (2.4012 against 2.4103): {text}")


def test_an_ablation_teaches_nothing_without_what_it_is_an_ablation_of(report: Report) -> None:
    (line,) = said(report, "bf16-no-masters", quality=QUALITY)
    assert line.startswith("bf16-no-masters: its bits_per_byte is worse (2.4012")
    stochastic = {"policy": "bf16-true,rounding=stochastic", "quality_verdict": "no worse", "quality": QUALITY}
    (line,) = said(report, "bf16-no-masters", **stochastic)
    assert line.startswith("bf16-no-masters: its bits_per_byte is no worse (2.4012")
    arms = [replace(arm, quality_verdict="worse") if arm.name == "bf16" else arm for arm in report.arms]
    (line,) = [line for line in verdicts(report.subject, report.plan, arms) if line.startswith("bf16-no-masters:")]
    assert line.endswith("that says nothing of master weights, for it is worse with it too")


def test_an_ablation_teaches_nothing_that_was_not_tested(report: Report) -> None:
    (line,) = said(report, "bf16-no-masters", quality_verdict="not tested", worse_by=None, quality=QUALITY)
    assert line == "bf16-no-masters: its bits_per_byte is 2.4012 against 2.4103, not tested"
    (line,) = said(report, "bf16-no-masters", quality_verdict="undecided", quality=QUALITY)
    assert line.startswith("bf16-no-masters: whether its bits_per_byte is worse is undecided (2.4012")
    assert said(report, "bf16-no-masters", quality=None, quality_verdict="not tested") == []
    (line,) = said(report, "bf16-no-masters", policy="bf16", quality=QUALITY)
    assert line.startswith("bf16-no-masters: its bits_per_byte is worse (2.4012")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("not installed", "bf16 was not run: it is so"),
        ("not possible", "bf16 cannot train this task here: it is so"),
        ("out of memory", "bf16 ran out of memory: it is so"),
        ("not finite", "bf16 did not stay finite: it is so; that counts as worse"),
        ("too slow", "bf16 was too slow to be trained to the end: it is so"),
        ("error", "bf16 failed: it is so"),
        ("a kind of its own", "bf16 failed: it is so"),
    ],
)
def test_failures(report: Report, kind: str, text: str) -> None:
    verdict = "worse" if kind == "not finite" else "not tested"
    arms = [replace(arm, failure=Failure(kind, "it is so"), quality_verdict=verdict) for arm in report.arms[2:3]]
    assert verdicts(report.subject, report.plan, [report.baseline, *arms]) == (text,)  # type: ignore[list-item]


def test_a_failed_baseline_comes_first(tmp_path: Path) -> None:
    failure = Failure("out of memory", "16 GB were not enough")
    failed = replace(SHAPES[0], failure=failure)
    report = assemble(made_folder(tmp_path / "trial", Made(shapes=(failed, *SHAPES[2:5]))))
    assert report.verdicts == (
        "fp32 ran out of memory: 16 GB were not enough; it is the baseline, "
        "so there is nothing to compare the others with",
        "lightning-bf16 was not run: lightning is not installed; pip install lightning",
    )
    failed = replace(SHAPES[0], run_failure=failure)
    first, second, *_ = assemble(made_folder(tmp_path / "runs", Made(shapes=(failed, *SHAPES[2:4])))).verdicts
    assert first.endswith("not enough (seed 0; seeds 1 and 2 too); it is the baseline, so no quality is tested")
    assert second.startswith("bf16 is the fastest of Duotone's policies, faster than fp32 by 1.7")


def test_rules_name_what_was_chosen() -> None:
    plan = made_plan(Made())
    other = Plan(plan.task, plan.arms, "bf16", margin=0.005, confidence=0.9)
    text = "\n".join(rules(replace(SUBJECT, lower_is_better=False), other))
    for part in ("bf16's mean", "0.5 % of", "90 % confidence", "bits_per_byte (higher is better)"):
        assert part in text
    assert "1 % of" in "\n".join(rules(SUBJECT, plan))


def test_no_sentence_ends_in_a_full_stop(report: Report) -> None:
    lines: tuple[str, ...] = (*report.verdicts, *report.rules, *report.remarks)
    assert not [line for line in lines if line.endswith(".") or line != line.strip()]
    assert all(isinstance(arm, ArmResult) for arm in report.arms)
