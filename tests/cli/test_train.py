"""`duotone train` as a user runs it: its results, its files, and each bad input as one line with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TINY = ("stdlib-text:tiny", "--steps", "4", "--log-every", "2")
TASK_FILE = """
import torch
from duotone.train import Task

def task():
    return Task(
        name="mine",
        model=torch.nn.Linear(1, 1),
        loss=lambda model, x: {loss},
        batches=lambda generator: {batches},
        evaluate=lambda model: {{"loss": 0.5}},
    )
"""


def write_task(name: str, loss: str = "model(x).square().mean()", batches: str = "[torch.ones(2, 1)]") -> str:
    Path(name).write_text(TASK_FILE.format(loss=loss, batches=batches))
    return name


def test_a_run_ends_with_its_summary(duotone):
    code, output, _ = duotone("train", *TINY)
    assert code == 0
    assert "this run, bf16" in output
    assert "bigram" in output
    assert "bytes per parameter: 14 = weights 2 + tails 2 + gradients 2 + moments 8" in output
    folder = Path("runs/stdlib-text-tiny-bf16-1")
    assert f"run: {folder}" in output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 4
    assert summary["evaluation"].keys() == {"bits_per_byte", "loss"}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "metrics.jsonl",
        "settings.yaml",
        "summary.json",
    }
    # nothing is overwritten: the next run has a folder of its own
    assert "runs/stdlib-text-tiny-bf16-2" in duotone("train", *TINY)[1]


def test_plain_lines_fit_what_they_say(duotone):
    _, output, _ = duotone("train", *TINY, "--policy", "fp16")
    (line,) = [line for line in output.splitlines() if line.startswith("step 4/4")]
    for word in ("loss", "bits_per_byte", "bytes/s", "scale 65536", "skipped 0"):
        assert word in line


def test_stop_and_resume(duotone):
    code, output, _ = duotone("train", *TINY, "--out", "run", "--stop-after", "3")
    assert code == 0
    assert "stopped after step 3 of 4, saved; go on with: duotone train --resume --out run\n" in output
    code, output, _ = duotone("train", "--resume", "--out", "run")
    assert code == 0
    assert "steps: 4 (0 skipped) in " in output
    assert "s of training since it was resumed, " in output


def test_resuming_a_finished_run_leaves_its_summary(duotone):
    task = (write_task("mine.py"), "--steps", "2", "--out", "run")
    _, output, _ = duotone("train", *task)
    assert "held-out loss 0.5000" in output
    assert "lower is better" in output
    assert "┃ held-out loss ┃" in output
    assert "since it was resumed" not in output
    summary = Path("run/summary.json")
    before = summary.read_bytes()
    code, output, _ = duotone("train", "--resume", "--out", "run")
    assert (code, output) == (0, "run is finished at step 2, held-out loss 0.5000; there is nothing left to do\n")
    assert summary.read_bytes() == before
    # killed between its last checkpoint and its summary
    summary.unlink()
    code, output, _ = duotone("train", "--resume", "--out", "run")
    assert code == 0
    assert "steps: 2 (0 skipped)\n" in output
    assert json.loads(summary.read_text())["evaluation"] == {"loss": 0.5}


def test_config_flags_and_print_config(duotone):
    Path("run.yaml").write_text("task: stdlib-text:tiny\nsteps: 7\nseed: 5\n")
    code, output, _ = duotone("train", "--config", "run.yaml", "--steps", "3", "--clip-norm", "none", "--print-config")
    assert code == 0
    settings = yaml.safe_load(output)
    assert (settings["steps"], settings["seed"], settings["clip_norm"]) == (3, 5, None)
    # the task's own settings show where nobody said otherwise
    assert settings["weight_decay"] == 0.1
    assert not Path("runs").exists()
    Path("printed.yaml").write_text(output)
    assert duotone("train", "--config", "printed.yaml", "--print-config")[1] == output


def test_a_users_own_task(duotone):
    code, output, _ = duotone("train", write_task("mine.py"), "--steps", "2", "--policy", "fp16")
    assert code == 0
    assert "mine under fp16 on" in output
    assert "runs/mine-fp16-1" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "bf17"), '"bf17" in policy "bf17" is neither a preset nor role=value; did you mean bf16'),
        (("--policy", "bf16-true"), 'policy "bf16-true" has no master and would lose every update'),
        (("--policy", "fp16,loss_scale=none"), "needs a loss scale"),
        (("stdlib-txt",), "there is no task 'stdlib-txt'; did you mean stdlib-text?"),
        (("stdlib-text:huge",), "stdlib-text has no size 'huge'"),
        (("absent.py",), "there is no file absent.py"),
        (("--steps", "0"), "steps is 0; it must be at least 1"),
        (("--steps", "-3"), "steps is -3; it must be at least 1"),
        (("--stop-after", "0"), "--stop-after is 0; it must be at least 1"),
        (("--device", "cuda:99"), 'device "cuda:99" is not there; this machine has cpu'),
        (("--optimizer", "adam"), 'optimizer is "adam"; did you mean adamw?'),
        (("--config", "absent.yaml"), "cannot read the configuration absent.yaml"),
        (("--resume",), "--resume needs --out"),
        (("--resume", "--out", "absent"), "absent holds no run to resume"),
        (("--resume", "latest-valid", "--out", "absent"), "absent holds no run to resume"),
        (("--resume=newest", "--out", "absent"), '--resume is "newest"; did you mean latest?'),
        (("--keep", "0"), "keep is 0; it must be at least 1"),
        (("--policy", "bf16; blok.*: param=float32,compute=float32"), "holds for no module"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(duotone, arguments, message):
    code, output, error = (
        duotone("train", "stdlib-text:tiny", *arguments)
        if arguments[0].startswith("--")
        else duotone("train", *arguments)
    )
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert output == ""
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\n", "bad.py defines no task()"),
        ("def task():\n    return 3\n", "task() of bad.py returned a int; it must return a Task"),
        ("import no_such_module\n", "bad.py, line 1: ModuleNotFoundError"),
        (TASK_FILE.format(loss="model(x)", batches="[torch.ones(2, 1)]"), "the loss of task 'mine' is a tensor of"),
        (TASK_FILE.format(loss="model(x).mean()", batches="[]"), "the data set of task 'mine' is empty"),
    ],
)
def test_a_bad_task_file_is_one_line(duotone, content, message):
    Path("bad.py").write_text(content)
    code, _, error = duotone("train", "bad.py", "--steps", "2")
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_loss_of_nan_exits_with_1(duotone):
    code, _, error = duotone("train", write_task("bad.py", loss="model(x).mean() * float('nan')"), "--steps", "12")
    assert code == 1
    assert "the loss became nan" in error


def test_another_run_is_not_overwritten(duotone):
    duotone("train", *TINY, "--out", "run")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    for arguments, message in (
        ((*TINY, "--out", "run"), "run holds another run; choose another --out"),
        (("--resume", "--out", "run", "--policy", "fp16"), 'run is a run under policy "bf16", not "fp16"'),
        (("--resume", "--out", "run", "--steps", "9"), "run is a run with steps 4, not 9"),
    ):
        code, _, error = duotone("train", *arguments)
        assert code == 2
        assert message in error
        assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named(duotone, damage):
    duotone("train", *TINY, "--out", "run", "--stop-after", "2")
    (checkpoint,) = Path("run/checkpoints").iterdir()
    tensors, manifest = checkpoint / "tensors.safetensors", checkpoint / "manifest.json"
    content = bytearray(tensors.read_bytes())
    if damage == "truncate":
        tensors.write_bytes(content[:-100])
    elif damage == "flip":
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "remove":
        tensors.unlink()
    else:
        manifest.write_text(manifest.read_text()[:-50])
    metrics = Path("run/metrics.jsonl").read_bytes()
    code, _, error = duotone("train", "--resume", "--out", "run")
    assert code == 2
    what = {"remove": "no tensors.safetensors", "manifest": "manifest.json is damaged"}
    assert error == (
        f"error: run holds no intact checkpoint: step-00000002 ({what.get(damage, 'tensors.safetensors is damaged')}); "
        "start the run anew in another --out\n"
    )
    assert Path("run/metrics.jsonl").read_bytes() == metrics


def test_version_and_help_need_no_torch():
    code = "import sys; sys.argv = ['duotone', '--version']\nfrom duotone.cli.main import main\n"
    code += "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("duotone 0.")
    assert result.stdout.endswith("False\n")
