"""The command lines, as a shell and the command line's own options read them."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import yaml

from duotone.compare.arms.catalogue import find_arms, own_arm
from duotone.compare.plan import Pace, Plan
from duotone.compare.report.commands import commands

PLAN = Plan("stdlib-text", (*find_arms("fp32,bf16-state16"), own_arm("wide=bf16,grad=float32")), "fp32", (0, 1))


def test_a_plan_without_steps_has_its_minutes_until_they_are_decided() -> None:
    repeat, show = commands(PLAN, None, Path("comparisons/a b"))
    assert repeat == (
        "duotone compare stdlib-text --arms fp32,bf16-state16 --arm wide=bf16,grad=float32 --baseline fp32 --seeds 2 "
        "--minutes 8 --margin 1% --confidence 95% --max-slowdown 10"
    )
    assert shlex.split(show) == ["duotone", "compare", "--show", "comparisons/a b"]
    repeat, _ = commands(PLAN, Pace(300, 20, 5, True), Path("x"))
    assert "--seeds 2 --steps 300 --margin" in repeat
    repeat, _ = commands(replace(PLAN, steps=50), None, Path("x"))
    assert "--steps 50" in repeat


def test_everything_else_that_was_asked_for() -> None:
    plan = replace(
        PLAN,
        task="my task.py",
        margin=0.005,
        confidence=0.99,
        max_slowdown=2.5,
        fit_memory_bytes=1_500_000_000,
        profile=True,
        settings={"device": "cpu", "learning_rate": 0.001, "optimizer": "it's"},
    )
    write, repeat, _ = commands(plan, None, Path("x"))
    words = shlex.split(repeat)
    assert words[2] == "my task.py"
    assert words[words.index("--seeds") + 4 :] == [
        "--margin", "0.5%", "--confidence", "99%", "--device", "cpu", "--max-slowdown", "2.5", "--fit-memory", "1500MB",
        "--profile", "--config", "settings.yaml",
    ]  # fmt: skip
    echo = shlex.split(write)
    assert (echo[0], echo[2:]) == ("echo", [">", "settings.yaml"])
    assert yaml.safe_load(echo[1]) == json.loads(echo[1]) == {"learning_rate": 0.001, "optimizer": "it's"}


def test_seeds_that_have_no_words_are_not_repeated() -> None:
    assert commands(replace(PLAN, seeds=(0, 2)), None, Path("x")) == ("duotone compare --show x",)
