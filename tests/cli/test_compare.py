"""`duotone compare` as a user runs it: what it shows, its files, its exit codes, and each bad input as one line."""

import json
import sys
from pathlib import Path

import pytest

TASK_FILE = """
import torch
from duotone.train import Task

HELD_OUT = torch.linspace(-1, 1, 16).unsqueeze(1)

def task():
    return Task(
        name="mine",
        model=torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.GELU(), torch.nn.Linear(16, 1)),
        loss=lambda model, x: (model(x) - x.square()).square().mean(),
        batches=lambda generator: (torch.rand(8, 1, generator=generator) for _ in range(3)),
        evaluate=lambda model: {"loss": (model(HELD_OUT) - HELD_OUT.square()).square().mean().item()},
    )
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--arms", "bf17"), ('there is no arm "bf17"', "bf16")),
        (("--arms", "bf16-mixd,fp32"), ("bf16-mixed",)),
        (("--arms", "bf16,bf16"), ("named twice",)),
        (("--arm", "bf16=bf16"), ("is an arm already",)),
        (("--arm", "mine"), ("NAME=POLICY",)),
        (("--arm", "mine=bf17"), ("bf17",)),
        (("--baseline", "sgd"), ('the baseline "sgd" is none of the arms',)),
        (("--seeds", "0"), ("--seeds is 0", "at least 1")),
        (("--steps", "0"), ("steps is 0",)),
        (("--steps", "9", "--minutes", "2"), ("--steps and --minutes", "choose one")),
        (("--margin", "0"), ("margin is 0.0", "1%")),
        (("--margin", "1"), ("margin is 1.0", "below 1")),
        (("--margin", "some"), ('"some" is no fraction',)),
        (("--confidence", "100%"), ("confidence is 1.0",)),
        (("--max-slowdown", "1"), ("max_slowdown is 1.0",)),
        (("--fit-memory", "2 bananas"), ("2 bananas", "2GB")),
        (("--resume",), ("--resume needs --out",)),
        (("--resume", "--out", "nothing-here"), ("holds no comparison",)),
        (("digits", "--resume", "--out", "x", "--steps", "4"), ("leave out task, --steps",)),
        (("--show", "nothing-here"), ("holds no comparison",)),
        (("--show", "x", "--arms", "bf16"), ("leave out --arms",)),
        (("--show", "x", "--diff", "x", "y"), ("choose one",)),
        (("--diff", "nothing-here", "x"), ("nothing-here holds no comparison",)),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_input_is_one_line(duotone, arguments, words):
    code, output, errors = duotone("compare", *arguments)
    assert code == 2
    assert not output
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_a_folder_in_use_is_refused(duotone):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    code, _, errors = duotone("compare", "--out", "mine")
    assert code == 2
    assert "holds other files; choose another --out" in errors
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def test_a_task_that_is_not_there_leaves_nothing_behind(duotone):
    code, _, errors = duotone("compare", "stdlib-txt")
    assert code == 2
    (line,) = errors.splitlines()
    assert "there is no task 'stdlib-txt'; did you mean stdlib-text?" in line
    assert not Path("comparisons").exists()


@pytest.mark.slow
def test_a_comparison_from_start_to_show_and_diff(duotone):
    Path("mine.py").write_text(TASK_FILE)
    own = ("--arm", "wide=bf16,grad=float32")
    code, output, errors = duotone(
        "compare", "mine.py", "--arms", "fp32,bf16,optimi-kahan", *own, "--steps", "12", "--seeds", "2"
    )
    installed = "optimi" in sys.modules or "not installed" not in output
    assert code == (0 if installed else 1), errors
    folder = Path("comparisons/mine-1")
    assert f"{folder}/report.html" in output
    for word in ("fp32", "bf16", "wide", "Verdicts", "with 95 %"):
        assert word in output
    # lines of what happens are not broken, so that they can be searched; what came of it fits a terminal
    assert max(map(len, output[output.index("verdict") : output.index("page, with charts")].splitlines())) <= 80
    results = json.loads((folder / "report.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ["fp32", "bf16", "optimi-kahan", "wide"]
    assert results["arms"][1]["seeds"] == 2
    assert results["is_complete"]
    typed = "duotone compare mine.py --arms fp32,bf16,optimi-kahan --arm wide=bf16,grad=float32 --steps 12 --seeds 2"
    assert results["commands"] == [typed, f"duotone compare --show {folder}"]
    assert {"report.html", "report.md", "plan.json"} <= {path.name for path in folder.iterdir()}

    (folder / "report.html").unlink()
    shown = duotone("compare", "--show", str(folder))
    assert (folder / "report.html").exists()
    assert shown[0] == 0
    assert "Verdicts" in shown[1]
    code, output, _ = duotone("compare", "--diff", str(folder), str(folder))
    assert code == 0
    assert "bf16" in output

    # what is finished is not done again
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("runs/*.json")}
    assert duotone("compare", "--resume", "--out", str(folder))[0] == (0 if installed else 1)
    kept = {path: stamp for path, stamp in before.items() if "optimi" not in path.name}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    more = duotone("compare", "--resume", "--out", str(folder), "--seeds", "3", "--margin", "50%")
    assert more[0] == code or not installed
    assert set(folder.rglob("runs/*-seed2.json"))
    repeat, _ = json.loads((folder / "report.json").read_text())["commands"]
    assert repeat == f"{typed} --seeds 3 --margin 0.5"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
