"""Optimizers that are not Duotone's: torch's, in every implementation, and some written as third parties write them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor


class Recent(torch.optim.Optimizer):
    """Follows the mean of its last gradients, and takes every liberty that torch leaves.

    State in lists, plain numbers and integers, state of no parameter, gradients changed in place, weights exchanged.
    """

    def __init__(self, params, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.state["all"] = {"calls": self.state["all"].get("calls", 0) + 1}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group["lr"])

    def _update(self, param: Tensor, lr: float) -> None:
        state = self.state[param]
        if not state:
            state.update(count=0, last=[], codes=torch.zeros_like(param, dtype=torch.int8))
        param.grad.add_(param, alpha=0.1)
        state["last"] = [*state["last"][-2:], param.grad.clone()]
        state["count"] += 1
        state["codes"] += 1
        param.data = param.data - lr / state["count"] ** 0.5 * torch.stack(state["last"]).mean(0)


class Failing(torch.optim.SGD):
    """Moves all weights, changes all gradients, and then fails."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.zero_()
        raise ArithmeticError("failed on purpose")


class HoldsWeights(torch.optim.SGD):
    """Holds references to its weights outside of its groups."""

    def __init__(self, params, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        self.names = {"first": [self.param_groups[0]["params"][0]]}


class Unseen(torch.optim.Optimizer):
    """Writes weights in a way that autograd does not see."""

    def __init__(self, params, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data.sub_(param.grad, alpha=group["lr"])


class Around(torch.optim.Optimizer):
    """Wraps another optimizer and shares its groups and state, as many third parties do."""

    def __init__(self, params, lr: float = 1e-3) -> None:
        self.base = torch.optim.SGD(params, lr, momentum=0.9)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def step(self, closure: Any = None) -> None:
        self.base.step()


# each takes parameters and settings
KINDS = {
    "NAdam": partial(torch.optim.NAdam, lr=1e-3, weight_decay=0.1),
    "Adafactor": partial(torch.optim.Adafactor, lr=1e-3),
    "Adafactor foreach": partial(torch.optim.Adafactor, lr=1e-3, foreach=True),
    "Adam": partial(torch.optim.Adam, lr=1e-3, foreach=False),
    "Adam foreach": partial(torch.optim.Adam, lr=1e-3, foreach=True),
    "Adam fused": partial(torch.optim.Adam, lr=1e-3, fused=True),
    "AdamW amsgrad": partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9, centered=True),
    "SGD": partial(torch.optim.SGD, lr=1e-3),
    "SGD momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD fused": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, dampening=0.5, fused=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=1e-3, initial_accumulator_value=0.125),
    "Adagrad fused": partial(torch.optim.Adagrad, lr=1e-3, fused=True),
    "Adadelta": partial(torch.optim.Adadelta, lr=1e-3),
    "Adamax": partial(torch.optim.Adamax, lr=1e-3),
    "RAdam": partial(torch.optim.RAdam, lr=1e-3),
    "ASGD": partial(torch.optim.ASGD, lr=1e-3),
    "Rprop": partial(torch.optim.Rprop, lr=1e-4),
    "Recent": Recent,
    "Unseen": Unseen,
    "Around": Around,
}
FUSED = [name for name in KINDS if name.endswith("fused")]
