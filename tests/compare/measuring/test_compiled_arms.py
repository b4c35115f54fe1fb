"""A compiled arm is one graph that takes the other arm's steps, and the time of compiling is none of theirs."""

import pytest
import torch

from duotone.compare.arms.catalogue import CATALOGUE
from duotone.compare.measuring.arm_trainer import ArmTrainer
from duotone.errors import ArmError
from duotone.train import built_in_task, compilation, resolve_settings


def trainer_of(name: str) -> ArmTrainer:
    torch.manual_seed(0)
    task = built_in_task("digits:mlp")
    policy = {"policy": CATALOGUE[name].policy or "fp32"}
    settings = resolve_settings(task.settings, {"task": task.name, "steps": 4, "warmup_steps": 1}, policy)
    return ArmTrainer(CATALOGUE[name], task, settings, torch.device("cpu"))


@pytest.mark.parametrize("name", ["fp32", "torch-amp-bf16", "bf16"])
def test_it_takes_the_same_steps(monkeypatch, name):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch.compiler.reset()
    plain, compiled = trainer_of(name), trainer_of(f"{name}-compiled")
    first, second = compiled.take(2), compiled.take(2)
    figures = compiled.evaluate()
    assert [step.loss for step in (*first.steps, *second.steps)] == [step.loss for step in plain.take(4).steps]
    assert figures == plain.evaluate()
    assert compiled.compilation.graphs == 1
    assert first.compile_seconds == compiled.compilation.seconds > 0
    assert first.seconds + first.compile_seconds >= first.steps[0].phases.step
    assert second.compile_seconds == plain.compilation.seconds == 0
    torch.compiler.reset()


def no_compiler() -> str:
    raise RuntimeError("No working C++ compiler found")


def test_without_a_compiler_the_arm_is_not_possible(monkeypatch):
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    with pytest.raises(ArmError, match=r"needs a C\+\+ compiler") as caught:
        trainer_of("bf16-compiled")
    assert caught.value.kind == "not possible"
