"""Signals end a run after the step that it is in, with that step saved, and change no bit of its result."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duotone.train import Task, print_at_once, stop_on_signal
from duotone.train.interruption import SIGNALS

from .small_task import small_task


def qualities(folder: Path) -> list[tuple[int, float | None]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["quality"]) for line in lines]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def hangups_arrive() -> Iterator[None]:
    """Let SIGHUP arrive where tests run under nohup, which Duotone respects."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_is_noted(number):
    asked, told = [], []
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop_on_signal(lambda: asked.append(True), told.append) as interruption:
        assert (interruption.cause, interruption.exit_code) == (None, 0)
        send(number)
        # schedulers and shells repeat it
        send(signal.SIGTERM)
    assert asked == [True]
    assert interruption.cause is number
    further = {signal.SIGINT: "; Ctrl-C again stops at once, without saving"}.get(number, "")
    assert told == [f"stopping after this step{further}"]
    assert interruption.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}[number]
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_second_ctrl_c_ends_at_once():
    before = [signal.getsignal(each) for each in SIGNALS]
    asked = []

    def twice() -> None:
        with stop_on_signal(lambda: asked.append(True)):
            send(signal.SIGINT)
            send(signal.SIGINT)
            asked.append("still here")

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert asked == [True]
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_ctrl_c_after_sigterm_says_what_the_next_one_does():
    told = []
    with stop_on_signal(lambda: None, told.append) as interruption:
        send(signal.SIGTERM)
        send(signal.SIGINT)
    assert told[1:] == ["stopping after this step; Ctrl-C again stops at once, without saving"]
    assert interruption.cause is signal.SIGTERM


def test_what_is_printed_at_once(capfd, monkeypatch):
    print_at_once("now")
    assert capfd.readouterr().err == "now\n"
    with monkeypatch.context() as patch:
        patch.setattr(os, "isatty", lambda descriptor: True)
        print_at_once("now")
    # whatever a progress bar has drawn in this line goes
    assert capfd.readouterr().err == "\r\x1b[2Know\n"
    kept = os.dup(2)
    os.close(2)
    try:
        print_at_once("nobody hears")
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signal(lambda: None) as interruption:
            send(signal.SIGINT)
        assert interruption.cause is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["step", "evaluation", "checkpoint"])
def test_a_signal_anywhere_ends_cleanly_and_loses_nothing(make_trainer, tmp_path, monkeypatch, where):
    settings = {"steps": 12, "log_every": 2, "evaluate_every": 4, "checkpoint_every": 4, "policy": "fp16"}
    whole = make_trainer(small_task, tmp_path / "whole", **settings)
    list(whole.run())
    armed = []

    def fire() -> None:
        if armed:
            armed.pop()
            send(signal.SIGTERM)

    def firing_task() -> Task:
        task = small_task()
        if where == "step":
            return replace(task, loss=lambda model, x: (fire(), task.loss(model, x))[1])
        if where == "evaluation":
            return replace(task, evaluate=lambda model: (fire(), task.evaluate(model))[1])
        return task

    trainer = make_trainer(firing_task, tmp_path / "run", **settings)
    if where == "checkpoint":
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda descriptor: (fire(), fsync(descriptor))[1])
    with stop_on_signal(trainer.stop) as interruption:
        for metrics in trainer.run():
            if metrics.step == 2:
                armed.append(True)
    # a checkpoint that is being written holds its step; whoever asks then gets one more
    assert trainer.step == {"step": 3, "evaluation": 4, "checkpoint": 5}[where]
    assert interruption.cause is signal.SIGTERM

    resumed = make_trainer(small_task, tmp_path / "run", resume=True, **settings)
    assert resumed.step == trainer.step
    list(resumed.run())
    for got, want in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want)
    assert qualities(tmp_path / "run") == qualities(tmp_path / "whole")


def test_a_stopped_run_can_go_on_in_the_same_process(make_trainer):
    trainer = make_trainer(small_task)
    trainer.stop()
    assert list(trainer.run()) == []
    assert trainer.step == 1
    assert [line.step for line in trainer.run()] == [4, 8, 12]
