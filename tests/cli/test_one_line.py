"""Whatever ends the command line is one line and an exit code, wherever it comes from."""

import errno
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from duotone.cli.main import _one_line, main

from .test_train import TINY, write_task

TASK = """
import sys
import torch
from duotone.train import Task

def loss(model, x):
    {loss}

def batches(generator):
    {batches}

def evaluate(model):
    {evaluate}

def task():
    {task}
    model = {model}
    return Task("mine", model, loss, batches, evaluate, units_in=lambda batch: {units})
"""
FINE = {
    "loss": "return model(x).square().mean()",
    "batches": "return [torch.ones(2, 1)]",
    "evaluate": "return {'loss': 0.5}",
    "task": "pass",
    "model": "torch.nn.Linear(1, 1)",
    "units": "2",
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), 'there is no verb "trian"; did you mean train?'),
        (("zzz",), 'there is no verb "zzz"; see duotone --help'),
        (("--versio",), "there is no option --versio; did you mean --version?"),
        (("train", "-x"), "there is no option -x; see duotone train --help"),
        (("train", "digits", "digits"), '"digits" is more than duotone train takes; see duotone train --help'),
        (("train", "--policy"), "--policy needs a value; see duotone train --help"),
        (("train", "--policy", ""), '"" in policy "" is neither a preset nor'),
        (("train", "--config", ""), "--config is empty; it must name a file or a folder; see duotone train --help"),
        (("train", "--stop-after", "x"), '--stop-after is "x"; it must be a whole number; see duotone train --help'),
        (("train", "--print-config=3"), "--print-config takes no value; see duotone train --help"),
        (("compare", "--seeds", "1.5"), '--seeds is "1.5"; it must be a whole number; see duotone compare --help'),
        (("compare", "--minutes", "x"), '--minutes is "x"; it must be a number; see duotone compare --help'),
        (("compare", "--diff", "x"), "--diff needs 2 values; see duotone compare --help"),
        (("explain", "--modules", "-1"), "--modules is -1; it must be at least 0"),
        (("export",), "duotone export needs RUN; see duotone export --help"),
        (("export", "run"), "duotone export needs --out; see duotone export --help"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistyped_command_is_one_line(duotone, arguments, message):
    code, output, error = duotone(*arguments)
    assert (code, output) == (2, "")
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",), ("compare", "-h"), ("ops", "-h")])
def test_help_fits_a_terminal(duotone, arguments):
    code, output, error = duotone(*arguments)
    assert (code, error) == (0 if arguments else 2, "")
    assert output.lstrip().startswith("Usage: duotone")
    assert max(map(len, output.splitlines())) <= 80
    assert "<bool>" not in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "return torch.ones(())"}, "the loss of task 'mine' has no gradient"),
        ({"loss": "return model(x).mean().long()"}, "the loss of task 'mine' is int64; it must be a floating-point"),
        ({"loss": "return model(x).mean() + undefined"}, "failed in mine.py, line 7: NameError: name 'undefined'"),
        ({"loss": "sys.exit(0)"}, "the loss of task 'mine' failed in mine.py, line 7: SystemExit: 0; mend it there"),
        ({"loss": "return model(x[:, :0]).mean()"}, "failed in mine.py, line 7: RuntimeError: "),
        ({"loss": "return sum(sum([[model(x)]] * 2, []))"}, "the loss of task 'mine' is a tensor of shape (2, 1)"),
        ({"batches": "return 3"}, "the batches of task 'mine' failed: TypeError: 'int' object is not iterable"),
        ({"batches": "yield 1 / 0"}, "the batches of task 'mine' failed in mine.py, line 10: ZeroDivisionError"),
        ({"evaluate": "return [0.5]"}, "evaluate of task 'mine' returned [0.5]; it must return a mapping"),
        ({"evaluate": "return {'loss': 'low'}"}, "evaluate of task 'mine' returned 'low' as 'loss'; it must be"),
        ({"evaluate": "return {'loss': '0.5'}"}, "evaluate of task 'mine' returned '0.5' as 'loss'; it must be"),
        ({"evaluate": "return {'loss': torch.ones(2)}"}, "returned tensor([1., 1.]) as 'loss'; it must be a number"),
        ({"evaluate": "return {'other': 1}"}, "task 'mine' evaluates other, but its quality is 'loss'"),
        ({"evaluate": "raise KeyError"}, "the evaluate of task 'mine' failed in mine.py, line 13: KeyError; mend"),
        ({"task": "sys.exit()"}, "mine.py, line 16: SystemExit"),
        ({"task": "raise BaseException('odd')"}, "mine.py, line 16: BaseException: odd"),
        ({"task": "return 3"}, "task() of mine.py returned a int; it must return a Task"),
        ({"model": "torch.nn.Identity()"}, "it must be a model with a parameter to train"),
        ({"model": "torch.nn.Linear(1, 1).requires_grad_(False)"}, "it must be a model with a parameter to train"),
        ({"units": "'many'"}, "units_in of task 'mine' returned 'many'; it must return a number of units"),
    ],
    ids=str,
)
def test_a_task_s_mistake_is_named(duotone, changes, message):
    Path("mine.py").write_text(TASK.format_map({**FINE, **changes}))
    code, _, error = duotone("train", "mine.py", "--steps", "1", "--backend", "reference")
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_traceback_where_it_is_asked_for(duotone):
    Path("mine.py").write_text(TASK.format_map({**FINE, "loss": "return 1 / 0"}))
    code, _, error = duotone("--traceback", "train", "mine.py", "--steps", "1", "--backend", "reference")
    assert code == 2
    assert "ZeroDivisionError: division by zero\n" in error
    assert error.splitlines()[-1].startswith("error: the loss of task 'mine' failed in mine.py")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_evaluation_that_is_not_finite_exits_with_1(duotone, value):
    Path("mine.py").write_text(TASK.format_map({**FINE, "evaluate": f"return {{'loss': float('{value}')}}"}))
    run = ("train", "mine.py", "--steps", "1", "--backend", "reference", "--out", "run")
    code, output, error = duotone(*run)
    assert code == 1
    assert "held-out loss" in output
    assert error.startswith(f"error: the run ended, but its held-out loss is {value}: look at evaluate")
    assert json.loads(Path("run/summary.json").read_text())["evaluation"] == {"loss": None}
    code, output, error = duotone("train", "--resume", "--out", "run")
    assert code == 1
    assert "is finished at step 1; there is nothing left to do" in output
    assert error.startswith("error: the run ended, but its held-out loss is not finite: look at evaluate")


class Full(io.StringIO):
    """An output that takes some letters and no more."""

    def __init__(self, left: int, number: int) -> None:
        super().__init__()
        self.left, self.number = left, number

    def write(self, text: str) -> int:
        """Write, or fail."""
        self.left -= len(text)
        if self.left < 0:
            raise OSError(self.number, "no more")
        return super().write(text)


@pytest.mark.parametrize(("number", "code", "line"), [(errno.EPIPE, 141, ""), (errno.ENOSPC, 2, "error: cannot write")])
def test_output_that_cannot_be_written(duotone, monkeypatch, capsys, number, code, line):
    monkeypatch.setattr(sys, "stdout", Full(10, number))
    assert duotone("formats")[0] == code
    write_task("mine.py")
    # after the lines of the start, in the middle of a run
    monkeypatch.setattr(sys, "stdout", Full(60, number))
    run = ("mine.py", "--steps", "9", "--log-every", "1", "--backend", "reference", "--out", "run")
    got, _, error = duotone("train", *run)
    assert got == code
    stopped, *rest = error.splitlines()
    assert stopped.startswith("stopped after step 1 of 9, saved; go on with: duotone train --resume --out run")
    assert "".join(rest).startswith(line)
    assert Path("run/checkpoints/step-00000001").is_dir()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert duotone("train", "--resume", "--out", "run")[0] == 0


def test_a_run_that_goes_on_elsewhere_is_not_resumed(duotone, monkeypatch):
    duotone("train", *TINY, "--out", "run", "--stop-after", "2")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    from duotone.own_folder import locked

    with locked(Path("run")):
        code, output, error = duotone("train", "--resume", "--out", "run")
        assert (code, output) == (2, "")
        assert error.startswith("error: run is in use by process ")
        assert error.count("\n") == 1
        assert duotone("train", *TINY, "--out", "run")[2].startswith("error: run holds another run")
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert duotone("train", "--resume", "--out", "run")[0] == 0


def test_a_warm_up_longer_than_the_run(duotone):
    code, _, error = duotone("train", *TINY, "--warmup-steps", "5")
    assert code == 2
    assert "warmup_steps is 5, and the run has 4 steps" in error
    assert "warmup_steps: 1\n" in duotone("train", *TINY, "--print-config")[1]


def test_memory_that_runs_out_is_one_line(duotone, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("duotone.cli.main.typer.main.get_command", lambda _: SimpleNamespace(make_context=fail))
    code, _, error = duotone("formats")
    assert (code, error) == (2, "error: memory ran out; give less to do, or more memory\n")


def test_streams_that_are_closed_are_none_s_business(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, "argv", ["duotone", "ops", "softmax"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0


def test_what_a_terminal_would_obey_is_spelled_out():
    assert _one_line("a\x1b[2J\nb\udcff") == "a\\x1b[2J b\\udcff"
    assert len(_one_line("x" * 10000)) == 2005
