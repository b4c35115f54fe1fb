"""The trainer: what a run logs, that stopping and resuming changes no bit, and how it fails."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from duotone.errors import CheckpointError, LossScaleCollapse, NonFiniteLoss, TaskError
from duotone.torch.scaling import device_scale
from duotone.train import Trainer, as_json
from duotone.wording.memory import Memory

from .small_task import no_batches, small_task


def bits_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return every tensor that the next step depends on, by name."""
    bits = {f"weight.{name}": param.detach() for name, param in trainer.model.named_parameters()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        bits |= {f"state.{index}.{name}": value for name, value in state.items()}
    bits["schedule"] = torch.tensor(trainer.schedule.get_last_lr())
    bits["random"] = torch.get_rng_state()
    return bits


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_have_the_promised_fields(make_trainer, tmp_path):
    list(make_trainer(small_task, tmp_path / "run", policy="fp16").run())
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert list(lines[0]) == [
        "step",
        "loss",
        "quality",
        "lr",
        "loss_scale",
        "skipped",
        "grad_norm",
        "units_per_second",
        "peak_memory_bytes",
    ]
    assert lines[0]["quality"] is None
    assert lines[-1]["quality"] > 0
    assert lines[0]["loss_scale"] == 2.0**16
    assert lines[0]["peak_memory_bytes"] > 2**20


def test_training_lowers_the_loss(make_trainer):
    trainer = make_trainer(small_task, policy="bf16", steps=200)
    before = trainer.summary().evaluation["loss"]
    list(trainer.run())
    assert trainer.summary().evaluation["loss"] < 0.3 * before


POLICIES = ["fp32", "bf16", "fp16", "bf16-mixed", "bf16,state=bfloat16", "bf16-true,rounding=stochastic"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stop_after", [5, 6])
def test_stopping_and_resuming_changes_no_bit(make_trainer, tmp_path, policy, optimizer, stop_after):
    settings = {"policy": policy, "optimizer": optimizer, "micro_batches": 2, "warmup_steps": 3}
    whole = make_trainer(small_task, tmp_path / "whole", **settings)
    list(whole.run())
    expected = bits_of(whole)

    list(make_trainer(small_task, tmp_path / "parts", **settings).run(stop_after))
    torch.manual_seed(999)
    resumed = make_trainer(small_task, tmp_path / "parts", resume=True, **settings)
    assert resumed.step == stop_after
    list(resumed.run())

    got = bits_of(resumed)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    timeless = [
        [{key: line[key] for key in line if key not in ("units_per_second", "peak_memory_bytes")} for line in lines]
        for lines in (read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts"))
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_kernels_change_no_bit_of_a_run(make_trainer, policy, optimizer):
    runs = []
    for backend in ("cpu", "reference"):
        trainer = make_trainer(small_task, policy=policy, optimizer=optimizer, backend=backend)
        metrics = list(trainer.run())
        runs.append((bits_of(trainer), [line.loss for line in metrics], [line.grad_norm for line in metrics]))
    (bits, *curves), (expected, *expected_curves) = runs
    assert curves == expected_curves
    assert bits.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(bits[name], value), name


def test_lines_after_the_last_checkpoint_are_dropped_on_resume(make_trainer, tmp_path):
    trainer = make_trainer(small_task, tmp_path / "run", checkpoint_every=6)
    run = trainer.run()
    # killed after step 8 was logged, before the next checkpoint
    next(run), next(run)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [4, 8]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    resumed = make_trainer(small_task, tmp_path / "run", resume=True, checkpoint_every=6)
    assert resumed.step == 6
    list(resumed.run())
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [4, 8, 12]


def test_another_seed_gives_another_run(make_trainer):
    losses = [[line.loss for line in make_trainer(small_task, seed=seed).run()] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_epochs_differ(make_trainer):
    seen = []

    def note(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return model(x).square().mean()

    list(make_trainer(lambda: small_task(note), steps=6).run())
    assert not any(torch.equal(seen[i], seen[j]) for i in range(6) for j in range(i))


def test_micro_batches_are_averaged(make_trainer):
    def constant_gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model[3].bias.sum()

    for micro_batches in (1, 4):
        trainer = make_trainer(
            lambda: small_task(constant_gradient), micro_batches=micro_batches, steps=4, policy="fp32"
        )
        (line,) = trainer.run()
        assert line.grad_norm == pytest.approx(1.0)


def test_only_the_newest_checkpoints_are_kept(make_trainer, tmp_path):
    for keep, kept in ((1, ["step-00000012"]), (2, ["step-00000009", "step-00000012"])):
        path = tmp_path / f"keep-{keep}"
        list(make_trainer(small_task, path, checkpoint_every=3, keep=keep).run())
        assert sorted(path.name for path in (path / "checkpoints").iterdir()) == kept


def test_the_schedule_stands_still_on_skipped_steps(make_trainer):
    trainer = make_trainer(small_task, policy="fp16", steps=6, log_every=1, warmup_steps=10)
    rates = []
    for line in trainer.run():
        rates.append(line.lr)
        if line.step == 2:
            # the weights' next gradient overflows, one step long
            trainer.scaler.load_state_dict(
                {**trainer.scaler.state_dict(), "state": {**trainer.scaler.state_dict()["state"], "scale": 2.0**32}}
            )
    assert line.skipped > 0
    assert rates[2] == rates[3] > rates[1]


def test_a_schedule_that_learns_of_skips_late_changes_no_bit(make_trainer, tmp_path, monkeypatch):
    settings = {"policy": "fp16", "steps": 9, "log_every": 1, "warmup_steps": 6, "learning_rate": 0.5}
    results = []
    for late in (False, True):
        if late:
            # as on an accelerator
            monkeypatch.setattr(device_scale, "is_on_host", lambda device: False)
        trainer = make_trainer(small_task, tmp_path / f"{late}", **settings)
        trainer.scaler.load_state_dict(
            {**trainer.scaler.state_dict(), "state": {**trainer.scaler.state_dict()["state"], "scale": 2.0**19}}
        )
        lines = list(trainer.run(5))
        trainer = make_trainer(small_task, tmp_path / f"{late}", resume=True, **settings)
        lines += trainer.run()
        results.append(([(line.loss, line.lr, line.skipped) for line in lines], bits_of(trainer)))
    (lines, bits), (late_lines, late_bits) = results
    assert late_lines == lines
    assert 0 < lines[-1][2] < 9
    assert all(torch.equal(late_bits[name], value) for name, value in bits.items())


def test_the_summary_is_json(make_trainer):
    trainer = make_trainer(small_task, policy="bf16")
    list(trainer.run())
    summary = as_json(trainer.summary())
    assert json.loads(json.dumps(summary))["bytes_per_parameter"] == 14.0
    assert summary["memory"]["moments_bytes"] == 8 * summary["memory"]["parameters"]
    assert isinstance(trainer.summary().memory, Memory)


def test_an_empty_data_set_is_named(make_trainer):
    trainer = make_trainer(lambda: dataclasses.replace(small_task(), batches=no_batches))
    with pytest.raises(TaskError, match="data set of task 'small' is empty"):
        list(trainer.run())


def test_a_loss_that_is_not_a_scalar_is_named(make_trainer):
    trainer = make_trainer(lambda: small_task(lambda model, x: model(x)))
    with pytest.raises(TaskError, match=r"the loss of task 'small' is a tensor of shape \(8, 1\)"):
        list(trainer.run())
    trainer = make_trainer(lambda: small_task(lambda model, x: 1.0))
    with pytest.raises(TaskError, match="the loss of task 'small' is float"):
        list(trainer.run())


def test_a_quality_that_is_not_evaluated_is_named(make_trainer):
    trainer = make_trainer(lambda: dataclasses.replace(small_task(), quality="accuracy"))
    with pytest.raises(TaskError, match="evaluates loss, but its quality is 'accuracy'"):
        list(trainer.run())


def test_a_non_finite_loss_is_not_blamed_on_the_scale(make_trainer):
    trainer = make_trainer(lambda: small_task(lambda model, x: model(x).mean() * math.nan), policy="fp16")
    with pytest.raises(NonFiniteLoss, match="the loss became nan by step 4: that is the forward pass"):
        list(trainer.run())


def test_a_collapse_names_the_parameters(make_trainer):
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return Overflow.apply(model[3].bias).mean() + model[0].bias.mean()

    trainer = make_trainer(lambda: small_task(loss), policy="fp16", steps=100)
    with pytest.raises(LossScaleCollapse, match=r"its floor: 1 of 2 gradients are not finite \(3\.bias\)"):
        list(trainer.run())


def test_resuming_without_a_checkpoint_is_refused(make_trainer, tmp_path):
    with pytest.raises(CheckpointError, match="without a folder"):
        make_trainer(small_task).resume()
    trainer = make_trainer(small_task, tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        trainer.resume()
