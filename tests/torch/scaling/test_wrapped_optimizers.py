"""Optimizers as frameworks wrap them: they work, or one sentence says what to hand over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError, PolicyError


class Lightning:
    """As Lightning's in manual optimization: of the optimizer's own class, and each step is handed a closure."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.__class__ = type(f"Lightning{type(optimizer).__name__}", (type(self), type(optimizer)), {})

    def step(self, closure: Callable[[], Any] | None = None, **settings: Any) -> Any:
        self.steps += 1
        return self.optimizer.step(closure=closure or (lambda: None), **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class Fabric(Lightning):
    """As Fabric's: the step takes a closure and nothing else."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.optimizer.step() if closure is None else self.optimizer.step(closure=closure)


class Accelerated(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by its class, that was never made one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.optimizer.step(closure)


SCALERS = {"LossScaler": lambda: dt.LossScaler("fp16"), "GradScaler": lambda: dt.GradScaler("cpu")}


def step(wrap: Callable[[Any], Any], scaler: Any, kind: Callable[[Any], Any]) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(0)
    model = dt.cast(nn.Linear(4, 2), "fp16")
    optimizer = wrap(kind(model.parameters()))
    scaler.scale(model(torch.ones(3, 4)).square().mean()).backward()
    scaler.step(optimizer)
    return dt.master_weights(model)["weight"], optimizer


@pytest.mark.parametrize("name", SCALERS)
@pytest.mark.parametrize("kind", [dt.AdamW, lambda params: dt.MasterWeights(torch.optim.NAdam(params))])
def test_lightnings_step_the_optimizer_and_count(name, kind):
    expected, _ = step(lambda optimizer: optimizer, SCALERS[name](), kind)
    weight, optimizer = step(Lightning, SCALERS[name](), kind)
    assert torch.equal(weight, expected)
    assert optimizer.steps == 1


@pytest.mark.parametrize("name", SCALERS)
@pytest.mark.parametrize("wrap", [Fabric, Accelerated])
def test_one_that_cannot_pass_scalars_on_is_named(name, wrap):
    with pytest.raises(OptimizerError, match=r"hides the AdamW in it.*give that one to the step"):
        step(wrap, SCALERS[name](), dt.AdamW)


def test_other_type_errors_are_the_optimizers_own():
    class Broken(dt.SGD):
        def step(self, *arguments: Any, **settings: Any) -> None:
            raise TypeError("mine")

    for scaler in SCALERS.values():
        with pytest.raises(TypeError, match="mine"):
            step(lambda optimizer: optimizer, scaler(), Broken)


def test_prepare_comes_before_the_framework():
    model = nn.Linear(4, 2)
    with pytest.raises(OptimizerError, match=r"Accelerated is a framework's wrapper around the AdamW in it; prepare"):
        dt.prepare(model, Accelerated(torch.optim.AdamW(model.parameters())), "bf16")
    assert dt.policy_of(model) is None

    class _FabricModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)

    with pytest.raises(PolicyError, match=r"cast the model first, then call fabric\.setup"):
        dt.cast(_FabricModule(), "bf16")


def test_what_looks_whether_a_step_was_called_sees_a_skip_on_a_cpu():
    # Accelerate puts a step of its own on the optimizer for that
    weight, scaler, called = nn.Parameter(torch.ones(2)), dt.GradScaler("cpu"), []
    optimizer = dt.SGD([weight], lr=0.1)
    own = optimizer.step
    optimizer.step = lambda *arguments, **settings: called.append(own(*arguments, **settings))
    for factor in (1.0, torch.inf, 1.0):
        scaler.scale(weight.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert len(called) == 2
    assert torch.allclose(weight, torch.full((2,), 0.8))


@pytest.mark.parametrize("fused", [False, True])
def test_weights_that_were_never_cast_are_rounded_by_torchs_own_and_that_is_said(fused, said):
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizers = [torch.optim.SGD([weight], lr=0.1, fused=fused), dt.SGD([weight], lr=0.1)]

    class Compensated(torch.optim.Optimizer):
        """Of another library, which may round in a way of its own."""

        def step(self, closure: Any = None) -> None:
            return None

    optimizers.append(Compensated([weight], {}))
    for _ in range(2):
        for optimizer in optimizers:
            scaler = dt.GradScaler("cpu")
            scaler.scale(weight.float().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    (message,) = said()
    assert message.startswith("SGD rounds updates of weights in torch.bfloat16")
