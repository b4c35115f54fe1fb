"""What other code does to sharded weights beside the optimizer is noticed on every rank, as on one."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import DuotoneWarning
from duotone.torch.parameters import foreign_averages
from duotone.torch.parameters.foreign_writes import VERY_MANY, WINDOW
from duotone.torch.parameters.masters import read_master
from duotone.torch.parameters.shards import local

X = torch.linspace(-1, 1, 64).view(4, 16)


def made() -> Any:
    torch.manual_seed(0)
    return dt.cast(nn.Sequential(nn.Linear(16, 15), nn.Linear(15, 1)), "bf16")


def train(model: nn.Module, step: Callable[[], Any], steps: int) -> None:
    for _ in range(steps):
        (model(X) - 3.0).square().mean().backward()
        step()
        for param in model.parameters():
            param.grad = None


def average(model: Any, *, in_parts: bool) -> None:
    dt.fully_shard(model)
    optimizer = dt.AdamW(model.parameters(), lr=1e-3, backend="reference")
    parts = local if in_parts else torch.Tensor.detach
    averages = [parts(param).detach().clone() for param in model.parameters()]

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        for kept, param in zip(averages, model.parameters(), strict=True):
            kept.lerp_(parts(param), 0.01)

    train(model, step, 40)


def train_by_hand(model: Any) -> None:
    dt.fully_shard(model)

    @torch.no_grad()
    def step() -> None:
        for param in model.parameters():
            param.sub_(1e-2 * param.grad)

    train(model, step, 4 * WINDOW)


@torch.no_grad()
def decay(model: Any) -> None:
    dt.fully_shard(model)
    for _ in range(VERY_MANY):
        for param in model.parameters():
            param.mul_(1 - 1e-4)
    dt.master_weights(model)


def shard_by_torch(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    train(model, torch.optim.SGD(model.parameters(), lr=1e-3).step, 2)


@torch.no_grad()
def edit_before_the_first_step(model: Any) -> None:
    dt.fully_shard(model)
    for param in model.parameters():
        local(param).neg_().mul_(2.0)
        assert torch.equal(local(read_master(param)), local(param).float())
    optimizer = dt.SGD(model.parameters(), lr=0.0, backend="reference")
    with torch.enable_grad():
        train(model, optimizer.step, 1)
    assert all(torch.equal(local(read_master(param)), local(param).float()) for param in model.parameters())


def train_as_usual(model: Any) -> None:
    dt.fully_shard(model)
    train(model, dt.AdamW(model.parameters(), backend="reference").step, 40)
    dt.master_weights(model)


HANDS: dict[str, Callable[[Any], None]] = {
    "average": lambda model: average(model, in_parts=False),
    "average of parts": lambda model: average(model, in_parts=True),
    "by hand": train_by_hand,
    "decay": decay,
    "torch": shard_by_torch,
    "edit": edit_before_the_first_step,
    "usual": train_as_usual,
}
SAID = {
    "average": ["somebody averages 16-bit weights of a cast model"],
    "average of parts": ["somebody averages 16-bit weights of a cast model"],
    "by hand": ["between forward passes, without a step of an optimizer"],
    "decay": [f"{VERY_MANY} times in a row, without a step of an optimizer, and changed not one bit"],
    "torch": ["torch's fully_shard has made new parameters of this cast FSDPSequential"],
    "edit": [],
    "usual": [],
}


def said() -> dict[str, list[str]]:
    texts = {}
    for kind, use in HANDS.items():
        # so many searches are made in a process
        foreign_averages._scans = itertools.count(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            use(made())
        texts[kind] = [str(each.message) for each in caught if issubclass(each.category, DuotoneWarning)]
    return texts


def test_what_others_do_to_sharded_weights_is_said_on_every_rank(ranks):
    for texts in ranks.run(2, said):
        assert {kind: len(each) for kind, each in texts.items()} == {kind: len(each) for kind, each in SAID.items()}
        assert all(part in text for kind in SAID for part, text in zip(SAID[kind], texts[kind], strict=True))
