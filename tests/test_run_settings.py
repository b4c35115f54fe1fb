"""Run settings: where each comes from, and how bad ones are named."""

import pytest

from duotone.errors import PolicyError, TaskError
from duotone.run_settings import RunSettings, read_config, resolve_settings


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
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
        ({"final_lr_fraction": 2}, "final_lr_fraction is 2.0; it must be between 0 and 1"),
        ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0); it must be two numbers from 0 to below 1"),
        ({"betas": [0.9]}, "betas is [0.9]; it must be 2 numbers"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; it must be positive, or none"),
        ({"optimizer": "adam"}, 'optimizer is "adam"; did you mean adamw?'),
        ({"task": 3}, "task is 3; it must be a text"),
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


def test_an_empty_config_sets_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert read_config(tmp_path / "run.yaml") == {}
