"""`duotone explain` as a user runs it: what it shows, at 80 columns, as JSON, and each bad input as one line."""

import json
from pathlib import Path

import pytest

TASK_FILE = """
import torch
from torch import nn
from duotone.train import Task

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.a_rather_long_name = nn.Linear(64, 64)

    def forward(self, x):
        return x + self.a_rather_long_name(self.norm(x).float().to(x.dtype))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def task():
    return Task(
        name="mine",
        model=Net(),
        loss=lambda model, x: model(x).float().square().mean(),
        batches=lambda generator: {batches},
        evaluate=lambda model: {{"loss": 0.5}},
    )
"""


def write_task(batches: str = "[torch.ones(32, 64).bfloat16()]") -> str:
    Path("mine.py").write_text(TASK_FILE.format(batches=batches))
    return "mine.py"


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_a_users_own_task(duotone):
    code, output, _ = duotone("explain", write_task(), "--policy", "bf16,inputs=bfloat16")
    assert code == 0
    assert output.startswith("mine: Net under bf16,inputs=bfloat16, one forward pass of ")
    lines = output.splitlines()
    titles = ["What stands out", "Modules:", "Operations:", "Casts:", "Saved for the backward pass:"]
    at = [next(number for number, line in enumerate(lines) if line.startswith(title)) for title in titles]
    assert at == sorted(at)
    findings = one_line("\n".join(lines[at[0] : at[1]]))
    assert "- the model's own code casts BF16 to FP32 at mine.py:13 in blocks.*: 3 casts, 24.6 kB" in findings
    rows = [line.split() for line in lines]
    assert ["blocks.*", "(3)", "Block", "-", "BF16", "BF16"] in rows
    assert any(row[:5] == ["a_rather_long_name", "Linear", "BF16", "BF16", "BF16"] for row in rows)
    assert any(row[:2] == ["linear", "4"] for row in rows)
    assert any(row[0:2] == ["BF16", "FP32"] and row[4:7] == ["kB", "model", "float"] for row in rows if len(row) > 6)
    assert any(row and row[0] == "activations" for row in rows)
    # nothing is written but what Python keeps of every module that it imports
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == {"mine.py"}


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-mixed"])
def test_a_built_in_task_is_whole_at_80_columns(duotone, policy):
    code, output, _ = duotone("explain", "stdlib-text:tiny", "--policy", policy)
    assert code == 0
    assert max(map(len, output.splitlines())) <= 80
    assert "…" not in output
    # no name in the table of modules is broken
    assert "    to_residual " in output
    assert f"GPT under {policy}," in output


def test_saved_bytes_that_are_no_numbers_in_floating_point_have_a_column(duotone):
    _, output, _ = duotone("explain", "stdlib-text:tiny")
    modules = output[output.index("Modules:") : output.index("Operations:")]
    assert "FP32     BF16    other" in modules
    # the indices that it looked up
    row = next(line.split() for line in modules.splitlines() if line.startswith("embedding"))
    assert row[-2:] == ["2.11", "kB"]
    _, output, _ = duotone("explain", write_task())
    assert "other" not in output


def test_depth(duotone):
    _, everything, _ = duotone("explain", "stdlib-text:tiny")
    _, output, _ = duotone("explain", "stdlib-text:tiny", "--modules", "2")
    modules = output[output.index("Modules:") : output.index("Operations:")]
    assert "blocks.0" in modules
    assert "to_qkv" not in modules
    assert "to_qkv" in everything

    def saved(text: str) -> str:
        return text[text.index("Saved for the backward pass:") :]

    assert saved(output) == saved(everything)
    _, output, _ = duotone("explain", "stdlib-text:tiny", "--modules", "0")
    # what is inside counts as the model's
    row = next(line for line in output.splitlines() if line.startswith("the model"))
    assert "kB" in row


def test_json(duotone):
    code, output, _ = duotone("explain", write_task(), "--policy", "bf16-mixed", "--json")
    found = json.loads(output)
    assert code == 0
    assert (found["model"], found["policy"]) == ("Net", "bf16-mixed")
    modules = {module["path"]: module for module in found["modules"]}
    assert modules["blocks.1.a_rather_long_name"]["parameter_dtypes"] == ["float32"]
    assert found["findings"]


def test_the_same_seed_gives_the_same_output(duotone):
    runs = [duotone("explain", "stdlib-text:tiny", "--seed", "3")[1] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digit",), "there is no task 'digit'; did you mean digits?"),
        (("--policy", "bf17"), "bf17"),
        (("none.py",), "there is no file none.py"),
        (("--seed", "-1"), "seed is -1; it must be at least 0"),
        (("--device", "cuda:99"), 'device "cuda:99" is not there'),
    ],
)
def test_bad_input_is_one_line(duotone, arguments, message):
    code, output, errors = duotone("explain", *arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_an_empty_data_set_is_one_line(duotone):
    code, _, errors = duotone("explain", write_task("[]"))
    assert code == 2
    assert errors == "error: the data set of task 'mine' is empty: an epoch yields no batch\n"
