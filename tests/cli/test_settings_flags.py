"""Every setting of a run is a flag, with the type, the choices, the default and the words of `RunSettings`."""

import subprocess
import sys
from dataclasses import fields
from typing import Literal, get_args, get_origin

import pytest
import yaml

from duotone.run_settings import RunSettings

SETTINGS = {
    "policy": "fp16,loss_scale=8",
    "device": "cpu",
    "backend": "reference",
    "compile": "True",
    "parallel": "auto",
    "seed": "3",
    "steps": "4",
    "micro_batches": "2",
    "optimizer": "adamw",
    "learning_rate": "0.25",
    "warmup_steps": "1",
    "final_lr_fraction": "0.5",
    "betas": "0.5 0.75",
    "momentum": "0.125",
    "weight_decay": "0.0625",
    "clip_norm": "2.5",
    "log_every": "6",
    "evaluate_every": "7",
    "checkpoint_every": "8",
    "keep": "9",
}


def test_every_setting_is_a_flag(duotone):
    assert ["task", *SETTINGS] == [field.name for field in fields(RunSettings)]
    flags = [part for name, text in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", *text.split())]
    # a switch takes no value
    flags.remove("True")
    code, output, error = duotone("train", "stdlib-text:tiny", *flags, "--print-config")
    assert (code, error) == (0, "")
    printed = yaml.safe_load(output)
    assert printed.pop("task") == "stdlib-text:tiny"
    printed["betas"] = " ".join(map(str, printed["betas"]))
    assert {name: str(value) for name, value in printed.items()} == SETTINGS
    assert "learning_rate: 0.125\n" in duotone("train", "digits", "--lr", "0.125", "--print-config")[1]


def test_help_says_what_the_settings_say(duotone):
    code, output, _ = duotone("train", "--help")
    assert code == 0
    assert max(map(len, output.splitlines())) <= 80
    words = " ".join(word.strip("│") for word in output.split())
    for field in fields(RunSettings):
        if field.name != "task":
            assert f"--{field.name.replace('_', '-')}" in words
        if get_origin(field.type) is Literal:
            assert "|".join(get_args(field.type)) in words
    assert words.count("(default: ") == len(fields(RunSettings)) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "many"), 'steps is "many"; it must be a whole number'),
        (("--clip-norm", "big"), 'clip_norm is "big"; it must be a number'),
        (("--betas", "0.9"), "--betas needs 2 values; see duotone train --help"),
        (("--backend", "gpu"), 'backend is "gpu"; did you mean cpu'),
        (("--stepz", "3"), "there is no option --stepz; did you mean --steps"),
    ],
)
def test_a_bad_flag_is_named(duotone, arguments, message):
    code, output, error = duotone("train", *arguments)
    assert (code, output) == (2, "")
    assert message in error
    assert error.count("\n") == 1


def test_help_needs_no_torch():
    code = "import sys; sys.argv = ['duotone', 'train', '--help']\nfrom duotone.cli.main import main\n"
    code += "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")
