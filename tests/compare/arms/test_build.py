"""Every arm takes its steps, and one that cannot says why before the first."""

import logging
import pickle
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import Any

import pytest
import torch

import duotone.torch as dt
from duotone.compare.arms import build as building
from duotone.compare.arms.build import build, versions
from duotone.compare.arms.catalogue import CATALOGUE
from duotone.errors import ArmError

from .curve import assign, batches_of, train, weights_of

# bytes of weight, tail, gradient and moments
BYTES = {
    "fp32": 16,
    "torch-amp-bf16": 16,
    "torch-amp-fp16": 16,
    "bf16": 14,
    "fp16": 14,
    "bf16-mixed": 16,
    "fp16-mixed": 16,
    "bf16-state16": 10,
    "duotone-fp32": 16,
    "accelerate-bf16": 16,
    "fabric-bf16-mixed": 16,
    "fabric-bf16-true": 8,
    "optimi-kahan": 10,
    # two of 1 byte and an FP32 scale for each 256 elements of the one large weight, with two tables of 256 in FP32
    "torchao-adamw8bit": 8 - 2 * (4096 * (1 - 4 / 256) - 1024) / 4801,
    "fp16-no-scaling": 14,
    "bf16-no-masters": 12,
    "fp16-no-masters": 12,
    "bf16-stochastic": 12,
}

SCALED = {"torch-amp-fp16", "fp16", "fp16-mixed", "fp16-no-masters"}


def arms() -> list[Any]:
    """Return the arms that train on a CPU; those of which each new shape takes seconds to compile are slow."""
    slow = {"torchao-adamw8bit"}
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in BYTES]


def skip_unless_installed(arm: str) -> None:
    try:
        versions(CATALOGUE[arm])
    except ArmError as error:
        pytest.skip(str(error))


def test_every_arm_is_tested_here_but_one_that_needs_a_gpu():
    # a compiled arm has the stepper of another one
    steppers = {arm.name for arm in CATALOGUE.values() if not arm.compiles}
    assert steppers - BYTES.keys() == {"accelerate-fp16"}
    for arm in CATALOGUE.values():
        if arm.compiles:
            plain = CATALOGUE[arm.name.removesuffix("-compiled")]
            assert (arm.stepper, arm.policy) == (plain.stepper, plain.policy)


@pytest.mark.parametrize("name", arms())
def test_trains_and_evaluates(name: str, capfd: pytest.CaptureFixture[str]):
    skip_unless_installed(name)
    assignment = assign(name, clip_norm=0.5)
    batches = batches_of(assignment)
    before = weights_of(assignment.task.model)
    stepper = build(assignment)
    with stepper.evaluating():
        first = assignment.task.evaluate(stepper.model)["loss"]
    for _ in range(3):
        for _ in range(2):
            loss = stepper.forward(next(batches))
            assert (loss.dtype, loss.shape) == (torch.float32, ())
            stepper.backward(loss)
        taken = stepper.update()
        assert not bool(taken.skipped)
        assert float(taken.loss_scale) == (65536.0 if name in SCALED else 1.0)
        assert all(param.grad is None for param in stepper.model.parameters())
    assert stepper.model.training
    with stepper.evaluating():
        last = assignment.task.evaluate(stepper.model)["loss"]
    after = weights_of(stepper.model)
    assert last < 0.8 * first
    assert all(not torch.equal(before[name], after[name].float()) for name in before)
    assert dt.memory(stepper.model, stepper.optimizer).bytes_per_parameter == pytest.approx(BYTES[name], abs=1e-9)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", arms())
def test_follows_the_schedule(name: str):
    skip_unless_installed(name)
    stepper = train(assign(name), steps=2)
    # two steps of warm-up are over, the third has the peak
    assert float(stepper.optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2, rel=1e-6)
    assert stepper.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert stepper.optimizer.param_groups[0].get("betas", (0.8, 0.95)) == (0.8, 0.95)


@pytest.mark.parametrize(
    "name", ["fp32", "torch-amp-bf16", "torch-amp-fp16", "fp16-mixed", "accelerate-bf16", "fabric-bf16-mixed"]
)
def test_clips_the_true_gradient(name: str):
    skip_unless_installed(name)
    assignment = assign(name, optimizer="sgd", momentum=0.0, weight_decay=0.0, clip_norm=1e-3, warmup_steps=0)
    before = weights_of(assignment.task.model)
    after = weights_of(train(assignment, steps=1).model)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm()
    # one step of SGD moves the weights by the learning rate times the clipped norm
    assert moved.item() == pytest.approx(1e-2 * 1e-3, rel=1e-2)


def test_what_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch):
    def missing(distribution: str) -> str:
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(building, "version", missing)
    with pytest.raises(ArmError) as raised:
        build(assign("optimi-kahan"))
    assert raised.value.kind == "not installed"
    assert str(raised.value) == (
        'arm "optimi-kahan" needs torch-optimi, which is not installed; run pip install "duotone[peers]", '
        "or pip install torch-optimi"
    )
    assert versions(CATALOGUE["bf16"]) == {}


def test_what_cannot_be_imported_is_not_called_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(building, "version", lambda distribution: "1.0")
    monkeypatch.setitem(sys.modules, "optimi", None)
    with pytest.raises(ArmError, match="torch-optimi is installed, but cannot be imported") as raised:
        build(assign("optimi-kahan"))
    assert raised.value.kind == "not possible"


def test_an_update_that_cannot_be_compiled_is_found_before_training(monkeypatch: pytest.MonkeyPatch):
    class Uncompiled(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("no compiler\nand a long trace")

    module: Any = ModuleType("torchao.optim")
    module.AdamW8bit = Uncompiled
    monkeypatch.setattr(building, "version", lambda distribution: "1.0")
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", module)
    with pytest.raises(ArmError, match="that fails here: no compiler; it needs a C") as raised:
        build(assign("torchao-adamw8bit"))
    assert raised.value.kind == "not possible"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("torchao-adamw8bit", {"optimizer": "sgd"}, 'torchao has no 8-bit optimizer "sgd"'),
        ("accelerate-fp16", {}, "Accelerate has no FP16 on a CPU, it trains in FP32 there"),
    ],
)
def test_what_a_library_cannot_do(monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any], message: str):
    monkeypatch.setattr(building, "version", lambda distribution: "1.0")
    with pytest.raises(ArmError, match=message) as raised:
        build(assign(name, **changes))
    assert raised.value.kind == "not possible"


def test_an_error_keeps_its_kind_between_processes():
    error = pickle.loads(pickle.dumps(ArmError("no", kind="not installed")))
    assert (str(error), error.kind) == ("no", "not installed")


def test_fabric_announces_nothing():
    skip_unless_installed("fabric-bf16-mixed")
    build(assign("fabric-bf16-mixed"))
    assert not import_module("lightning_utilities.core.rank_zero").log.isEnabledFor(logging.INFO)


def test_optimi_has_the_betas():
    skip_unless_installed("optimi-kahan")
    group = train(assign("optimi-kahan"), steps=0).optimizer.param_groups[0]
    assert (group["beta1"], group["beta2"]) == (0.8, 0.95)


def test_optimi_has_the_other_optimizers_too():
    skip_unless_installed("optimi-kahan")
    for optimizer in ("sgd", "lion"):
        stepper = train(assign("optimi-kahan", optimizer=optimizer, learning_rate=1e-3), steps=1)
        # weight, gradient, one BF16 moment, compensation
        assert dt.memory(stepper.model, stepper.optimizer).bytes_per_parameter == 8
