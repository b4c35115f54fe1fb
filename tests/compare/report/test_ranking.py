"""Which policy is named, and which other library is said to be ahead."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from duotone.compare.report.assembly import assemble
from duotone.compare.report.ranking import ranking
from duotone.compare.report.report import ArmResult, Report, Spread

from .made_records import made_folder

FAST = Spread(1.72, 1.66, 1.79)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return assemble(made_folder(tmp_path_factory.mktemp("made") / "whole"))


def ranked(report: Report, changes: Mapping[str, Mapping[str, Any]], baseline: str = "fp32") -> tuple[str, ...]:
    arms: list[ArmResult] = [replace(arm, **changes.get(arm.name, {})) for arm in report.arms]
    return ranking(report.subject, replace(report.plan, baseline=baseline), arms)


def test_the_fastest_policy_that_is_no_worse_is_named(report: Report) -> None:
    assert ranked(report, {"bf16": {"times_faster": FAST}}) == (
        "bf16 is the policy to use here: of Duotone's, it is the fastest whose bits_per_byte is no worse than fp32's; "
        "it is faster than fp32 by 1.72 (1.66 to 1.79), and takes 0.55 of its memory",
    )


@pytest.mark.parametrize("verdict", ["worse", "undecided", "not tested"])
def test_a_faster_policy_without_a_verdict_of_no_worse_is_passed_over(report: Report, verdict: str) -> None:
    slow = {"times_faster": Spread(0.95, 0.92, 0.98)}
    line, *more = ranked(report, {"bf16": {"quality_verdict": verdict}, "fp16": slow, "torch-amp-bf16": slow})
    undecided = "bf16 is faster than that, but whether its bits_per_byte is worse is undecided; more seeds may tell"
    assert more == ([undecided] if verdict == "undecided" else [])
    assert line == (
        "no policy of Duotone is shown to be faster than fp32 at no worse bits_per_byte: "
        "fp16 is slower than fp32 by 1.05 (1.02 to 1.09), and takes 0.56 of its memory"
    )


@pytest.mark.parametrize("verdict", ["undecided", "not tested"])
def test_without_any_test_passed_the_fastest_is_named_with_that(report: Report, verdict: str) -> None:
    changes = {arm.name: {"quality_verdict": verdict} for arm in report.arms}
    (line,) = ranked(report, {**changes, "bf16": {"quality_verdict": verdict, "times_faster": FAST}})
    assert line == (
        "bf16 is the fastest of Duotone's policies, faster than fp32 by 1.72 (1.66 to 1.79), and takes 0.55 of its "
        f"memory; whether its bits_per_byte is as good as fp32's is {verdict}"
    )


def test_if_all_are_worse_it_is_said(report: Report) -> None:
    changes = {name: {"quality_verdict": "worse"} for name in ("bf16", "fp16")}
    assert ranked(report, changes) == ("no policy of Duotone keeps fp32's bits_per_byte on this task",)


def test_a_faster_peer_is_named(report: Report) -> None:
    peer = {"times_faster": Spread(2.0, 1.9, 2.1)}
    _, line = ranked(report, {"bf16": {"times_faster": FAST}, "torch-amp-bf16": peer})
    assert line == (
        "torch-amp-bf16 is ahead of every policy of Duotone that is no worse in speed: "
        "2.00 (1.90 to 2.10) times fp32's against 1.72 (1.66 to 1.79) of bf16"
    )
    close = {"times_faster": Spread(1.8, 1.75, 1.85)}
    _, line = ranked(report, {"bf16": {"times_faster": FAST}, "torch-amp-bf16": close})
    assert "in speed, but by less than the intervals tell apart: 1.80" in line
    # written, it is the same
    same = {"times_faster": Spread(1.724, 1.7, 1.8)}
    assert len(ranked(report, {"bf16": {"times_faster": FAST}, "torch-amp-bf16": same})) == 1


def test_a_policy_whose_quality_is_open_is_named_only_if_it_is_shown_to_be_faster(report: Report) -> None:
    slow = {"times_faster": Spread(0.95, 0.92, 0.98)}
    around = {"quality_verdict": "undecided", "times_faster": Spread(1.1, 0.97, 1.2)}
    changes = {"bf16": around, "fp16": slow, "torch-amp-bf16": slow}
    assert len(ranked(report, changes)) == 1
    changes["bf16"] = {"quality_verdict": "undecided", "times_faster": Spread(1.1, 0.99, 1.2)}
    assert ranked(report, changes)[1].startswith("bf16 is faster than that, but whether its bits_per_byte is worse")


def test_a_peer_ahead_of_policies_that_no_test_has_passed(report: Report) -> None:
    changes = {arm.name: {"quality_verdict": "not tested"} for arm in report.arms}
    peer = {"quality_verdict": "not tested", "times_faster": Spread(9.0, 8.9, 9.1)}
    _, line = ranked(report, {**changes, "torch-amp-bf16": peer})
    assert line.startswith("torch-amp-bf16 is ahead of every policy of Duotone that is not known to be worse in speed")


@pytest.mark.parametrize(("peak_memory_bytes", "lines"), [(98_000_000, 1), (97_999_999, 2)])
def test_peaks_within_2_percent_say_nothing(report: Report, peak_memory_bytes: int, lines: int) -> None:
    changes = {
        "bf16": {"peak_memory_bytes": 100_000_000},
        "torch-amp-bf16": {"peak_memory_bytes": peak_memory_bytes},
    }
    assert len(ranked(report, changes)) == lines


@pytest.mark.parametrize("verdict", ["worse", "undecided"])
def test_a_peer_ahead_at_another_quality_is_not_ahead(report: Report, verdict: str) -> None:
    peer = {
        "times_faster": Spread(2.0, 1.9, 2.1),
        "peak_memory_bytes": 1,
        "bytes_per_parameter": 6.0,
        "quality_verdict": verdict,
    }
    assert len(ranked(report, {"torch-amp-bf16": peer})) == 1


def test_a_peer_with_less_memory_is_named(report: Report) -> None:
    peer = {"peak_memory_bytes": 90_000_000, "bytes_per_parameter": 10.0}
    # fp16 has the least of Duotone's here, and bf16 is the fastest
    less = {"fp16": {"peak_memory_bytes": 100_000_000, "bytes_per_parameter": 12.0}}
    assert ranked(report, {"torch-amp-bf16": peer, **less})[1:] == (
        "torch-amp-bf16 is ahead of every policy of Duotone that is no worse in memory: 90.0 MB against 100 MB of fp16",
        "torch-amp-bf16 is ahead of every policy of Duotone that is no worse in bytes per parameter: 10 against 12 of "
        "fp16",
    )
    between = {"peak_memory_bytes": 105_000_000, "bytes_per_parameter": 13.0}
    assert len(ranked(report, {"torch-amp-bf16": between, **less})) == 1
    unknown = {"peak_memory_bytes": None, "bytes_per_parameter": 0.0}
    assert len(ranked(report, {"torch-amp-bf16": unknown})) == 1


def test_ablations_and_failed_arms_win_nothing(report: Report) -> None:
    best = {"times_faster": Spread(9.0, 8.9, 9.1), "quality_verdict": "no worse", "peak_memory_bytes": 1}
    lines = ranked(report, {"bf16-no-masters": best, "lightning-bf16": best})
    assert len(lines) == 1
    assert lines[0].startswith("bf16 is the policy to use here")


def test_a_policy_as_the_baseline(report: Report) -> None:
    as_baseline = {"times_faster": None, "quality_verdict": "not tested"}
    slower = {"times_faster": Spread(0.6, 0.5, 0.7), "quality_verdict": "no worse"}
    changes = {"bf16": as_baseline, "fp16": slower, "fp32": slower, "torch-amp-bf16": slower}
    assert ranked(report, changes, "bf16") == (
        "bf16, the baseline, is the policy to use here: no other of Duotone's is shown to be faster at no worse "
        "bits_per_byte",
    )
    without = replace(report, arms=tuple(arm for arm in report.arms if arm.name != "fp16"))
    assert ranked(without, changes, "bf16") == ()


def test_nothing_is_ranked_without_runs_or_without_policies(report: Report) -> None:
    assert ranked(report, {arm.name: {"times_faster": None} for arm in report.arms}) == ()
    without = replace(report, arms=tuple(arm for arm in report.arms if arm.group != "duotone"))
    assert ranked(without, {}) == ()
