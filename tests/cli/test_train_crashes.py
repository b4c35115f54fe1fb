"""`duotone train` under signals, on a full disk, and resumed from what a crash left: nothing is lost but time."""

import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

# a task that does something at its nth loss, once: a run that was resumed is not hit again
TASK = """
import os, pathlib, resource, signal
import torch
from duotone.train import Task

{at_import}
losses = 0

def loss(model, x):
    global losses
    losses += 1
    if losses == {nth} and not pathlib.Path("done").exists():
        pathlib.Path("done").touch()
        {act}
    return model(x).square().mean()

def task():
    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 4))
    batches = lambda generator: [torch.randn(2, 4, generator=generator) for _ in range(3)]
    return Task(name="mine", model=model, loss=loss, batches=batches, evaluate=lambda model: {{"loss": 0.5}})
"""
STEPS = ("--steps", "7", "--log-every", "2", "--checkpoint-every", "2", "--policy", "fp16")
COMMAND = (sys.executable, "-m", "duotone.cli.main", "train")


def write_task(name: str, act: str = "pass", nth: int = 5, at_import: str = "") -> str:
    Path(name).write_text(TASK.format(act=act, nth=-1 if act == "pass" else nth, at_import=at_import))
    return name


def kill(name: str, times: int = 1) -> str:
    return "; ".join([f"os.kill(os.getpid(), signal.{name})"] * times)


def steps_kept(run: str) -> list[str]:
    return sorted(path.name.removeprefix("step-0000000") for path in Path(run, "checkpoints").iterdir())


def bits_of(run: str) -> dict[str, object]:
    """Return the last checkpoint's files, and the lines of metrics without what was measured of the process."""
    last = sorted(Path(run, "checkpoints").iterdir())[-1]
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    kept = [{key: line[key] for key in line if key not in ("units_per_second", "peak_memory_bytes")} for line in lines]
    return {"lines": kept, **{path.name: path.read_bytes() for path in last.iterdir()}}


@pytest.fixture
def whole(duotone):
    """Return what a run comes to that nothing happens to."""
    assert duotone("train", write_task("task.py"), *STEPS, "--out", "whole")[0] == 0
    return bits_of("whole")


def go_on(duotone, *how: str) -> dict[str, object]:
    code, output, error = duotone("train", "--resume", *how, "--out", "run")
    assert code == 0, error
    assert "steps: 7 " in output
    return bits_of("run")


def test_ctrl_c_saves_and_says_how_to_go_on(duotone, whole):
    code, output, _ = duotone("train", write_task("task.py", kill("SIGINT")), *STEPS, "--out", "run")
    assert code == 130
    assert output.endswith("stopped by SIGINT after step 5 of 7, saved; go on with: duotone train --resume --out run\n")
    assert steps_kept("run") == ["4", "5"]
    assert not Path("run/summary.json").exists()
    assert go_on(duotone) == whole


def test_a_second_ctrl_c_ends_at_once(duotone, whole):
    code, output, _ = duotone("train", write_task("task.py", kill("SIGINT", times=2)), *STEPS, "--out", "run")
    assert code == 130
    assert output.endswith(
        "stopped at once, nothing was saved since step 4; go on with: duotone train --resume --out run\n"
    )
    assert steps_kept("run") == ["2", "4"]
    assert go_on(duotone) == whole


def test_sigterm_to_a_process(duotone, whole):
    # before there is a run, the signal's own way is kept
    at_import = "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL"
    act = kill("SIGTERM", times=2) + "; print('the step goes on', file=__import__('sys').stderr)"
    write_task("task.py", act, at_import=at_import)
    result = subprocess.run([*COMMAND, "task.py", *STEPS, "--out", "run"], capture_output=True, text=True, check=False)
    assert result.returncode == 143, result.stderr
    assert result.stderr.endswith("stopping after this step\nthe step goes on\n")
    assert result.stdout.endswith(
        "stopped by SIGTERM after step 5 of 7, saved; go on with: duotone train --resume --out run\n"
    )
    assert go_on(duotone) == whole


@pytest.mark.parametrize(
    ("limit_bytes", "message"),
    [
        (3000, "cannot write the checkpoint run/checkpoints/step-00000006: File too large; "),
        (300, "cannot write run/metrics.jsonl: File too large; step-00000004 is untouched"),
    ],
)
def test_a_disk_that_takes_no_more(duotone, whole, limit_bytes, message):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    act = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limits[1]}))"
    try:
        code, _, error = duotone("train", write_task("task.py", act), *STEPS, "--out", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert error.count("\n") == 1
    assert message in error
    assert "step-00000004 is untouched; when that is mended, go on with --resume" in error
    assert steps_kept("run") == ["2", "4"]
    assert go_on(duotone) == whole


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(duotone, whole):
    act = kill("SIGINT", times=2)
    _, output, _ = duotone("train", write_task("task.py", act, nth=2), *STEPS, "--log-every", "1", "--out", "run")
    assert "stopped at once, nothing was saved yet; go on with: duotone train --resume --out run\n" in output
    assert not Path("run/checkpoints").exists()
    code, output, _ = duotone("train", "--resume", "--log-every", "2", "--out", "run")
    assert code == 0
    assert output.startswith("run ended before its first checkpoint; starting again from step 0\n")
    assert bits_of("run") == whole


def test_a_broken_checkpoint_is_passed_over_when_asked(duotone, whole):
    duotone("train", write_task("task.py"), *STEPS, "--stop-after", "5", "--keep", "3", "--out", "run")
    assert steps_kept("run") == ["2", "4", "5"]
    broken = Path("run/checkpoints/step-00000005/tensors.safetensors")
    broken.write_bytes(broken.read_bytes()[:-1])
    before = Path("run/metrics.jsonl").read_bytes()
    code, _, error = duotone("train", "--resume", "--out", "run")
    assert code == 2
    assert error.count("\n") == 1
    assert "step-00000005 (tensors.safetensors is damaged)" in error
    assert "--resume latest-valid goes on from step-00000004, which is intact" in error
    assert Path("run/metrics.jsonl").read_bytes() == before
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, error = duotone("train", "--resume", "latest-valid", "--out", "run")
    assert code == 0
    assert error.count("\n") == 1
    assert error == (
        "note: passed over step-00000005 (tensors.safetensors is damaged); going on from step-00000004, 1 step is done "
        "again\n"
    )
    assert bits_of("run") == whole


def test_a_folders_name_is_quoted(duotone):
    _, output, _ = duotone("train", write_task("task.py"), *STEPS, "--stop-after", "1", "--out", "my run")
    assert "go on with: duotone train --resume --out 'my run'\n" in output
