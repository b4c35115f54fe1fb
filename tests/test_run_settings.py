"""Run settings: where each comes from, and how bad ones are named."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from duotone.config_file import read_config
from duotone.errors import PolicyError, TaskError
from duotone.run_settings import RunSettings, resolve_settings, with_warmup


def test_later_sources_go_first():
    merged = resolve_settings({"steps": 1, "seed": 1}, {"seed": 2, "policy": "fp32"}, {"policy": "fp16"})
    assert (merged.steps, merged.seed, merged.policy.name) == (1, 2, "fp16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": -5}, "steps is -5; it must be at least 1"),
        ({"steps": 1.5}, "steps is 1.5; it must be a whole number"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"micro_batches": 0}, "micro_batches is 0; it must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be at least 0"),
        ({"learning_rate": "fast"}, 'learning_rate is "fast"; it must be a number'),
        ({"final_lr_fraction": 2}, "final_lr_fraction is 2.0; it must be between 0 and 1"),
        ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0); it must be two numbers from 0 to below 1"),
        ({"betas": [0.9]}, "betas is [0.9]; it must be 2 numbers"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; it must be positive and finite in FP32, or none"),
        ({"optimizer": "adam"}, 'optimizer is "adam"; did you mean adamw?'),
        ({"task": 3}, "task is 3; it must be a text"),
        ({"learning_rate": math.inf}, "learning_rate is inf; it must be finite in FP32"),
        ({"weight_decay": math.nan}, "weight_decay is nan; it must be finite in FP32"),
        ({"momentum": 1e39}, "momentum is 1e+39; it must be finite in FP32"),
        ({"learning_rate": 10**400}, "learning_rate is inf; it must be finite in FP32"),
        ({"clip_norm": math.inf}, "clip_norm is inf; it must be positive and finite in FP32, or none"),
        ({"betas": 0.9}, "betas is 0.9; it must be 2 numbers, such as [0.9, 0.999]"),
        ({"seed": 2**32}, "seed is 4294967296; it must be at most 4294967295"),
        ({"steps": 10**30}, "steps is 1000000000000000000000000000000; it must be at most 9007199254740992"),
        ({1: 3}, "there is no setting 1; known: task, "),
        ({"task": ["x" * 1000] * 1000}, "task is ['xxx"),
        ({"stepz": 3}, 'there is no setting "stepz"; did you mean steps?'),
    ],
)
def test_a_bad_setting_is_named(changes, message):
    with pytest.raises(TaskError) as error:
        resolve_settings(changes)
    assert str(error.value).startswith(message)


def test_a_bad_policy_is_the_policy_s_own_error():
    with pytest.raises(PolicyError, match="did you mean bf16"):
        RunSettings(policy="bf17")


def test_yaml_round_trips(tmp_path):
    settings = RunSettings(betas=(0.8, 0.99), clip_norm=None, policy="fp16,loss_scale=8", learning_rate=3)
    path = tmp_path / "run.yaml"
    path.write_text(settings.to_yaml())
    assert resolve_settings(read_config(path)) == settings
    assert isinstance(settings.learning_rate, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [("steps: [", "is not YAML"), ("- steps", "holds a list; it must map"), (None, "cannot read the configuration")],
)
def test_a_bad_config_is_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TaskError, match=message):
        read_config(path)


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\nweight_decay: 1E-2\nseed: 010\nsteps: 1_000\ntask: 1:30\nclip_norm: ~\n")
    settings = resolve_settings(read_config(path))
    assert (settings.learning_rate, settings.weight_decay, settings.seed) == (1e-3, 1e-2, 10)
    assert (settings.steps, settings.task, settings.clip_norm) == (1000, "1:30", None)


@pytest.mark.parametrize("task", ["1e5", "010", "no", "1:30", "~", "0x1f", ".inf", "é", "a: b", " x ", "<<"])
def test_a_text_is_never_read_back_as_something_else(tmp_path, task):
    path = tmp_path / "run.yaml"
    path.write_text(RunSettings(task=task).to_yaml())
    assert read_config(path)["task"] == task


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", 'line 2, column 1 is not YAML: "steps" is set twice; keep one'),
        ("a: &x 1\nb: *x\n", "line 2, column 4 is not YAML: anchors have no place in settings"),
        ("[" * 30000, "is not YAML: it is deeper than 20 levels"),
        ("- " * 30000, "is not YAML: RecursionError"),
        ("? [1]\n: 2", "is not YAML: found unhashable key"),
        ("a: !!timestamp x", "is not YAML: AttributeError"),
        ("a: " + "1" * 5000, "is not YAML: ValueError"),
        ("# " + "x" * 70000, "is longer than 65,536 bytes"),
        ("a: \x00", "is not YAML: ReaderError"),
    ],
)
def test_a_config_that_no_person_wrote_is_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(TaskError, match=message):
        read_config(path)


@pytest.mark.parametrize("path", ["/dev/zero", "/", "x" * 5000, "no\0name"])
def test_a_config_without_an_end_or_a_name_is_named(path):
    with pytest.raises(TaskError, match="the configuration"):
        read_config(Path(path))


def test_a_warm_up_ends_within_the_run():
    long = RunSettings(steps=20, warmup_steps=50)
    with pytest.raises(TaskError, match="warmup_steps is 50, and the run has 20 steps"):
        with_warmup(long, {"warmup_steps": 50})
    # a task's own
    assert with_warmup(long, {"steps": 20}).warmup_steps == 5
    assert with_warmup(replace(long, steps=50), {"warmup_steps": 50}).warmup_steps == 50


def test_an_empty_config_sets_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert read_config(tmp_path / "run.yaml") == {}
