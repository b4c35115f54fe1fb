"""The JSON report's keys are a promise to programs; its values are strict JSON."""

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest

from duotone.compare.report.as_json import as_json
from duotone.compare.report.assembly import assemble
from duotone.compare.report.report import ArmResult, Report, Spread

from .made_records import Made, made_folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    made = Made(fits=True, settings={"device": "cpu", "betas": [0.9, 0.95]})
    return assemble(made_folder(tmp_path_factory.mktemp("made") / "whole", made))


def read(text: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_keys_are_promised(report: Report) -> None:
    content = read(as_json(report))
    assert list(content) == [
        "format", "subject", "plan", "pace", "environment", "arms", "verdicts", "rules", "remarks", "commands",
        "is_complete",
    ]  # fmt: skip
    assert content["format"] == 1
    assert set(content["subject"]) == {
        "name", "quality", "lower_is_better", "unit", "parameters", "baselines", "facts", "task_steps",
        "task_warmup_steps", "micro_batch",
    }  # fmt: skip
    assert set(content["plan"]) == {
        "task", "arms", "baseline", "seeds", "steps", "minutes", "settings", "margin", "confidence", "max_slowdown",
        "fit_memory_bytes", "profile", "argv",
    }  # fmt: skip
    assert set(content["pace"]) == {"steps", "warmup_steps", "turn_steps", "together"}
    arm = content["arms"][3]
    assert set(arm) == {
        "name", "group", "summary", "policy", "failure", "seeds", "step_seconds", "phases", "units_per_second",
        "times_faster", "peak_memory_bytes", "memory_ratio", "memory", "saved_bytes", "bytes_per_parameter", "quality",
        "evaluation", "worse_by", "quality_verdict", "skipped", "loss_scale", "curves", "fit", "notes",
    }  # fmt: skip
    assert set(arm["quality"]) == set(arm["evaluation"]["accuracy"]) == {"value", "lower", "upper"}
    assert set(arm["phases"]) == {"step", "forward", "backward", "update"}
    assert set(arm["curves"][0]) == {"seed", "losses", "loss_scales", "skipped", "step_seconds"}
    assert set(arm["fit"]) == {
        "arm", "limit_bytes", "micro_batch", "peak_memory_bytes", "units_per_second", "tried", "failure",
        "remark",
    }  # fmt: skip
    assert set(content["arms"][4]["failure"]) == {"kind", "reason"}


def test_values_survive(report: Report) -> None:
    content = read(as_json(report))
    for shown, arm in zip(content["arms"], report.arms, strict=True):
        assert shown["name"] == arm.name
        assert shown["quality_verdict"] == arm.quality_verdict
        assert shown["memory_ratio"] == arm.memory_ratio
        assert shown["step_seconds"] == (None if arm.step_seconds is None else vars(arm.step_seconds))
    assert content["arms"][3]["curves"][0]["loss_scales"] == [[1, 65536.0], [4, 32768.0], [91, 16384.0]]
    assert content["plan"]["settings"] == {"device": "cpu", "betas": [0.9, 0.95]}
    assert content["verdicts"] == list(report.verdicts)
    assert content["is_complete"] is True
    assert content["plan"]["profile"] is False


def test_what_is_not_finite_is_null(report: Report) -> None:
    broken = replace(
        report.arms[1],
        quality=Spread(math.nan, -math.inf, math.inf),
        evaluation={"loss": Spread(math.inf, 0.5, math.inf)},
        curves=(replace(report.arms[1].curves[0], losses=((5, 1.5), (10, math.nan))),),
    )
    arm = read(as_json(replace(report, arms=(report.arms[0], broken))))["arms"][1]
    assert arm["quality"] == {"value": None, "lower": None, "upper": None}
    assert arm["evaluation"]["loss"] == {"value": None, "lower": 0.5, "upper": None}
    assert arm["curves"][0]["losses"] == [[5, 1.5], [10, None]]


def test_a_comparison_that_has_only_begun(report: Report) -> None:
    content = read(as_json(replace(report, pace=None, arms=report.arms[:1])))
    assert content["pace"] is None
    assert set(content["arms"][0]) == {field.name for field in fields(ArmResult)}
