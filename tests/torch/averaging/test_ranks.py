"""Averages on several ranks: each averages its part of a sharded model, and any number of ranks loads them."""

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.torch.parameters.shards import is_shard, local


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def sharded_run(path, policy: str):
    """Return this rank's averages, whether a block of `applied` leaves its parts alone, and what is loaded again."""
    torch.manual_seed(0)
    model = dt.fully_shard(
        dt.cast(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1, bias=False)), policy)
    )
    optimizer, average = dt.AdamW(model.parameters(), lr=1e-2), dt.Average(model, decay=0.5)
    scaler = dt.LossScaler(policy, **({"init_scale": 8.0} if policy == "fp16" else {}))
    # an overflow on one rank is skipped on all
    for step in range(4):
        factor = float("inf") if step == 2 and torch.distributed.get_rank() == 1 else 1.0
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        scaler.backward(model(inputs).float().square().mean() * factor)
        scaler.step(optimizer)
        optimizer.zero_grad()
        average.update()
    state = average.state_dict()["averages"]
    assert all(map(is_shard, state.values()))
    masters = {name: local(value) for name, value in dt.master_weights(model, optimizer).items()}
    with average.applied(model):
        inside = {name: local(value).clone() for name, value in dt.master_weights(model, optimizer).items()}
        # gathers the averages
        evaluated = model(torch.ones(1, 6))
    with average.applied(model), dt.full_precision(model):
        assert all(torch.equal(local(model.get_parameter(name)), value) for name, value in inside.items())
    after = {name: local(value) for name, value in dt.master_weights(model, optimizer).items()}
    if policy == "bf16":
        assert all(torch.equal(inside[name], local(value)) for name, value in state.items())
    assert all(torch.equal(after[name], value) for name, value in masters.items())
    assert not torch.equal(evaluated, model(torch.ones(1, 6)))
    dt.save_checkpoint(path, model, optimizer, average=average)
    second = dt.Average(model)
    dt.load_checkpoint(path, model, optimizer, average=second)
    assert all(torch.equal(local(value), local(state[name])) for name, value in second.state_dict()["averages"].items())
    exported = {name: value.full_tensor() for name, value in average.model_state_dict().items()}
    return {name: value.full_tensor() for name, value in state.items()}, exported, average.updates.item()


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_each_rank_averages_its_part_and_any_number_of_ranks_loads_them(ranks, tmp_path, policy):
    (averages, exported, updates), other = ranks.run(2, sharded_run, tmp_path / "last", policy)
    assert updates == 3
    assert same(averages, other[0])
    assert same(averages, exported)
    # one process
    model = dt.cast(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1, bias=False)), policy)
    average = dt.Average(model)
    dt.load_checkpoint(tmp_path / "last", model, average=average)
    assert same(average.state_dict()["averages"], averages)
    assert average.updates.item() == 3


def replicated_run(policy: str):
    torch.manual_seed(0)
    model = dt.data_parallel(dt.cast(nn.Linear(6, 5), policy))
    optimizer, average = dt.AdamW(model.parameters(), lr=1e-2), dt.Average(model, decay=0.5)
    for step in range(3):
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)) + torch.distributed.get_rank()
        model(inputs).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    averages = average.state_dict()["averages"]
    with average.applied(model):
        assert torch.equal(dt.master_weights(model.module)["weight"], averages["weight"])
    return averages


def test_ranks_with_copies_have_the_same_average(ranks):
    first, second = ranks.run(2, replicated_run, "bf16")
    assert list(first) == ["weight", "bias"]
    assert same(first, second)
