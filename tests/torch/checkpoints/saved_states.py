"""States in `saved/` that were written before optimizers declared their slots, and what came of going on from them.

`PYTHONPATH=src python -m tests.torch.checkpoints.saved_states` writes them anew, which is to be done with the code of
that time alone: commit b121a56. Weights and gradients are fractions that every format has, so that no library's
arithmetic is in them.
"""

import copy
import gzip
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import duotone.torch as dt

SAVED = Path(__file__).with_name("saved")
_KINDS = {
    "adamw": partial(dt.AdamW, lr=0.01, betas=(0.9, 0.99), seed=3),
    "sgd": partial(dt.SGD, lr=0.01, momentum=0.9, nesterov=True, seed=3),
    "sgd-plain": partial(dt.SGD, lr=0.01, weight_decay=0.1, seed=3),
    "lion": partial(dt.Lion, lr=0.001, weight_decay=0.1, seed=3),
    "wrapped": lambda params: dt.MasterWeights(torch.optim.SGD(params, lr=0.01, momentum=0.5), seed=3),
}
_POLICIES = {
    "bf16": "bf16",
    "fp16": "fp16",
    "state16": "bf16,state=bfloat16",
    "stochastic": "bf16-true,rounding=stochastic",
}
# optimizer and policy of each checkpoint
CASES = {
    f"{kind}-{name}": (kind, policy)
    for kind in _KINDS
    for name, policy in _POLICIES.items()
    if {kind, name} != {"wrapped", "state16"} and (kind != "sgd-plain" or name == "bf16")
}

# of which there is a checkpoint's folder besides
CHECKPOINTS = ("adamw-fp16", "sgd-state16", "lion-bf16", "wrapped-stochastic")


def made(case: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model and the optimizer of a case, before their first step."""
    kind, policy = CASES[case]
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.copy_(_fractions(param, number) * (1 + 2.0**-13))
    dt.cast(model, policy)
    return model, _KINDS[kind](model.parameters())


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Take some steps; the last parameter has no gradient in the first three."""
    for step in steps:
        params = list(model.parameters())
        for number, param in enumerate(params):
            param.grad = _fractions(param, 7 * step + number).to(param.dtype)
        if step < 3:
            params[-1].grad = None
        optimizer.step()


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of weights and states by name."""
    tensors: dict[str, Any] = dict(model.named_parameters())
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"state.{index}.{name}": value for name, value in state.items()}
    return {name: value.detach().clone() for name, value in tensors.items() if isinstance(value, Tensor)}


def read() -> dict[str, dict[str, Any]]:
    """Return of every case the weights, the optimizer's state dict, and all tensors three steps later."""
    with gzip.open(SAVED / "states.pt.gz") as file:
        return torch.load(file, weights_only=True)


def _fractions(like: Tensor, number: int) -> Tensor:
    places = torch.arange(like.numel(), dtype=torch.int64).view(like.shape)
    return ((places * 37 + number * 11 + 5) % 61 - 30).float() / 32


if __name__ == "__main__":
    states = {}
    for case in CASES:
        torch.manual_seed(0)
        model, optimizer = made(case)
        stepped(model, optimizer, range(3))
        if case in CHECKPOINTS:
            dt.save_checkpoint(SAVED / case, model, optimizer)
        weights = {name: param.detach().clone() for name, param in model.named_parameters()}
        saved = {"weights": weights, "optimizer": copy.deepcopy(optimizer.state_dict())}
        stepped(model, optimizer, range(3, 6))
        states[case] = {**saved, "three steps later": tensors_of(model, optimizer)}
    with gzip.open(SAVED / "states.pt.gz", "wb") as file:
        torch.save(states, file)
