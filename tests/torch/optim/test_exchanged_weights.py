"""Wrapped optimizers that write weights outside of a step, as schedule-free ones do, write FP32 masters."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import duotone.torch as dt


class ScheduleFree(torch.optim.SGD):
    """Trains at one point and is evaluated at another: what `eval` and `train` of schedule-free optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.is_training = True

    def step(self, closure: Any = None) -> Any:
        assert self.is_training
        for group in self.param_groups:
            for param in group["params"]:
                z = self.state[param].setdefault("z", param.detach().clone())
                z.add_(param.grad, alpha=-0.1)
                param.data.lerp_(z, 0.3)

    def eval(self) -> None:
        self._exchange_points(-9.0)
        self.is_training = False

    def train(self) -> None:
        self._exchange_points(0.9)
        self.is_training = True

    @torch.no_grad()
    def _exchange_points(self, weight: float) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if "z" in self.state[param]:
                    param.lerp_(self.state[param]["z"], weight)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16"])
def test_what_exchanges_weights_outside_of_a_step_does_so_with_masters(policy, inner, same_bits):
    plain = nn.Linear(3, 2)
    model = dt.cast(copy.deepcopy(plain), policy)
    theirs, ours = ScheduleFree(plain.parameters()), dt.MasterWeights(ScheduleFree(model.parameters()))
    called = ours.optimizer if inner else ours
    assert hasattr(ours, "eval")
    assert not hasattr(dt.MasterWeights(torch.optim.SGD(nn.Linear(1, 1).parameters())), "eval")
    for _ in range(2):
        for param, its in zip(model.parameters(), plain.parameters(), strict=True):
            param.grad = torch.full(param.shape, 0.5, dtype=param.dtype)
            its.grad = torch.full(its.shape, 0.5)
        ours.step()
        theirs.step()
        called.eval()
        theirs.eval()
        assert all(same_bits(master, plain.get_parameter(name)) for name, master in dt.master_weights(model).items())
        assert not ours.optimizer.is_training
        called.train()
        theirs.train()
        assert all(same_bits(master, plain.get_parameter(name)) for name, master in dt.master_weights(model).items())
    assert {state["z"].dtype for state in ours.state.values()} == {torch.float32}
    copied = copy.deepcopy(ours)
    copied.eval()
    assert copied.optimizer.is_training is False
    assert ours.optimizer.is_training
