"""`torchrun -m duotone train` as a user runs it: rank 0 alone speaks, all stop together, and a failure ends all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# a task that does something on a rank at its nth loss, once
TASK = """
import os, pathlib, signal, time, warnings
import torch
from duotone.train import Task

rank, losses = int(os.environ.get("RANK", 0)), 0

def loss(model, x):
    global losses
    losses += 1
    {act}
    return model(x).square().mean()

def task():
    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 4))
    batches = lambda generator: [torch.randn(2, 4, generator=generator) for _ in range(7)]
    return Task(name="mine", model=model, loss=loss, batches=batches, evaluate=lambda model: {{"loss": 0.5}})
"""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
MODULE = (*TORCHRUN, "-m", "duotone", "train")
SCRIPT = (*TORCHRUN, "--no-python", str(Path(sys.executable).with_name("duotone")), "train")
# without a note of torchrun's own
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
POLICY = ("--policy", "bf16", "--log-every", "1")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def write_task(act: str = "pass") -> str:
    Path("task.py").write_text(TASK.format(act=act))
    return "task.py"


def start(*command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finish(process: "subprocess.Popen[str]") -> tuple[str, list[str], str]:
    """Return the output, the lines that are Duotone's among errors, and all of these."""
    output, errors = process.communicate(timeout=120)
    own = [line for line in errors.splitlines() if line.startswith(("error:", "note:"))]
    return output, own, errors


def steps_logged(run: str) -> list[int]:
    path = Path(run, "metrics.jsonl")
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_all_ranks_stop_together_and_others_go_on(duotone):
    write_task("time.sleep(0.02); losses == 1 and warnings.warn('odd')")
    process = start(*MODULE, "task.py", *POLICY, "--parallel", "ddp", "--steps", "1000", "--out", "my run")
    while not steps_logged("my run"):
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, own, errors = finish(process)
    steps = steps_logged("my run")
    lines = output.splitlines()
    assert own == ["note: odd"], errors
    assert lines[0] == "mine under bf16 on cpu, 2 ranks, ddp"
    assert [line.split()[1] for line in lines[2:-1]] == [f"{step}/1000" for step in steps]
    assert lines[-1] == (
        f"stopped by SIGTERM after step {steps[-1]} of 1000, saved; go on with: torchrun --nproc-per-node 2 -m duotone "
        "train --resume --out 'my run'"
    )
    assert [path.name for path in Path("my run/checkpoints").iterdir()] == [f"step-{steps[-1]:08d}"]
    assert errors.count("exitcode") == 0
    assert errors.count("stopping after this step") == 1

    # one process goes on with it, and says what is different
    code, output, error = duotone("train", "--resume", "--out", "my run", "--stop-after", str(steps[-1] + 1))
    assert code == 0, error
    assert f"stopped after step {steps[-1] + 1} of 1000" in output


def test_a_failure_on_one_rank_ends_all_with_its_message():
    write_task("assert losses < 3 or not rank, 'far too many'")
    process = start(*SCRIPT, "task.py", *POLICY, "--parallel", "fsdp", "--steps", "9", "--out", "run")
    output, own, errors = finish(process)
    assert process.returncode == 1
    assert "fsdp" in output.splitlines()[0]
    assert steps_logged("run") == [1, 2]
    (line,) = own
    assert line.startswith("error: rank 1: the loss of task 'mine' failed in task.py, line ")
    assert ": AssertionError: far too many; mend it there" in line
    assert "gloo" not in errors


@pytest.mark.slow
def test_what_is_wrong_with_a_folder_is_said_once():
    write_task()
    Path("taken").mkdir()
    Path("taken", "file").touch()
    output, own, errors = finish(start(*MODULE, "task.py", *POLICY, "--out", "taken"))
    assert output == ""
    assert own == ["error: taken holds other files; choose another --out, or go on with a run by --resume"]
    assert "exitcode  : 2" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("assert losses < 3, 'far too many'", "error: the loss of task 'mine' failed in task.py, line"),
        ("if losses == 3 and rank: return x", "error: rank 1: the loss of task 'mine' is a tensor of shape (2, 4)"),
        ("if losses == 3: return x", "error: the loss of task 'mine' is a tensor of shape (2, 4)"),
        ("if losses == 3 and rank: os.kill(os.getpid(), signal.SIGKILL)", "error: another rank has ended"),
    ],
)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_whatever_ends_a_run_is_said_once(act, message, parallel):
    write_task(act)
    process = start(*MODULE, "task.py", *POLICY, "--parallel", parallel, "--checkpoint-every", "2", "--out", "run")
    _, own, errors = finish(process)
    assert process.returncode == 1
    assert errors.count(message) == 1, errors
    assert len(own) <= 1
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--no-such-option",), "No such option: --no-such-option"),
        (("--stop-after", "0"), "error: --stop-after is 0; it must be at least 1"),
        (("absent.py",), "error: there is no file absent.py"),
        (("--parallel", "pipeline"), 'error: parallel is "pipeline"; known: auto, ddp, fsdp'),
        (
            ("digits", "--policy", "bf16,grad=float32"),
            "its gradient in torch.float32; DistributedDataParallel keeps both",
        ),
        (
            ("digits", "--device", "cuda:0"),
            'error: device "cuda:0" is one for 2 ranks; say "cuda", and each takes its own',
        ),
    ],
)
def test_bad_input_is_said_once(arguments, message):
    output, _, errors = finish(start(*MODULE, *arguments))
    assert output == ""
    assert errors.count(message) == 1, errors
    assert "exitcode  : 2" in errors
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["stdlib-text:tiny", "digits", "digits:convnet", "own_task.py"])
def test_every_task_trains_in_both_ways(task):
    if task.endswith(".py"):
        task = str(Path(__file__).parents[2] / "examples" / task)
    losses = []
    for parallel in ("ddp", "fsdp"):
        told = (
            "--parallel",
            parallel,
            "--steps",
            "20",
            "--log-every",
            "20",
            "--evaluate-every",
            "5",
            "--out",
            parallel,
        )
        process = start(*MODULE, task, "--policy", "bf16", *told)
        _, own, errors = finish(process)
        assert process.returncode == 0, errors
        assert own == []
        losses.append(json.loads(Path(parallel, "metrics.jsonl").read_text().splitlines()[-1])["quality"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
