"""Weights that others change between steps are followed: whatever way they are changed, under every optimizer."""

import copy
import io
from typing import Any

import pytest
import torch
from tests.torch.optim.changed_weights import MARKS, OPTIMIZERS, every_policy, give_gradients, make
from torch import Tensor, nn
from torch.nn.utils import prune

import duotone.torch as dt
from duotone.torch.kernels.checksums import CELL
from duotone.torch.parameters import shards
from duotone.torch.parameters.masters import read_master
from duotone.torch.parameters.storage import storage_of

pytestmark = [*MARKS, pytest.mark.filterwarnings("error:other code")]


def trained(policy: str, name: str = "AdamW", steps: int = 3) -> tuple[nn.Module, Any]:
    """Return a model whose masters are no 16-bit numbers, and its optimizer."""
    model = make(policy, 40, 30)
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(steps):
        step(model, optimizer, seed)
    return model, optimizer


def step(model: nn.Module, optimizer: Any, seed: int = 0, **arguments: Tensor) -> None:
    give_gradients(model, seed)
    optimizer.step(**arguments)


def by_data(weight: Tensor) -> None:
    weight.data.mul_(0.5)


def by_new_data(weight: Tensor) -> None:
    weight.data = weight.detach() * 0.5


def under_no_grad(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(0.5)


def by_fused_adamw(weight: Tensor) -> None:
    twin = nn.Parameter(weight.detach())
    twin.grad = torch.ones_like(twin)
    torch.optim.AdamW([twin], lr=0.1, fused=True).step()


def by_exchange(weight: Tensor) -> None:
    weight.data[[0, 1]] = weight.data[[1, 0]]


WAYS = (by_data, by_new_data, under_no_grad, by_fused_adamw, by_exchange)


def has_own_master(weight: Tensor) -> bool:
    return torch.equal(read_master(weight), weight.detach().float())


@every_policy
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("edit", WAYS)
def test_a_changed_weight_is_its_own_master(policy, name, edit):
    model, optimizer = trained(policy, name)
    weight = model[0].weight
    assert not has_own_master(weight)
    others = [read_master(param) for param in model.parameters() if param is not weight]
    edit(weight)
    changed = weight.detach().clone()
    # in the first cell there is a row that was not changed; the second is the last
    edited = slice(None) if edit is not by_exchange else slice(0, CELL)
    expected = changed.float().flatten()[edited]
    assert torch.equal(read_master(weight).flatten()[edited], expected)
    step(model, optimizer, 7, found_inf=torch.tensor(True))
    assert torch.equal(weight, changed)
    assert torch.equal(read_master(weight).flatten()[edited], expected)

    # a step from these masters is one of a model that has just these
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    dt.load_master_weights(twin, dt.master_weights(model))
    for each, own in ((model, optimizer), (twin, its_optimizer)):
        step(each, own, 8)
    masters, others_now = dt.master_weights(model), [read_master(p) for p in model.parameters() if p is not weight]
    assert all(torch.equal(masters[key], value) for key, value in dt.master_weights(twin).items())
    assert not has_own_master(weight)
    assert not any(torch.equal(one, other) for one, other in zip(others, others_now, strict=True))


@every_policy
def test_what_is_in_other_cells_keeps_every_bit(policy):
    model, _ = trained(policy)
    weight = model[0].weight
    before = read_master(weight).flatten()
    weight.data.view(-1)[CELL + 3] = 0.25
    after = read_master(weight).flatten()
    assert torch.equal(after[:CELL], before[:CELL])
    assert torch.equal(after[2 * CELL :], before[2 * CELL :])
    assert torch.equal(after[CELL : 2 * CELL], weight.detach().flatten()[CELL : 2 * CELL].float())
    # half a unit of BF16, once
    assert ((after - before).abs() <= before.abs() * 2**-8)[[*range(CELL + 3), *range(CELL + 4, 1200)]].all()


@every_policy
def test_weights_that_are_put_back_have_their_masters_again(policy):
    model, optimizer = trained(policy)
    masters = dt.master_weights(model)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.zeros_like(value) for name, value in saved.items()})
    assert all(not master.any() for master in dt.master_weights(model).values())
    optimizer.state_dict()
    model.load_state_dict(saved)
    assert all(torch.equal(masters[name], master) for name, master in dt.master_weights(model).items())
    step(model, optimizer)
    other, its_optimizer = trained(policy)
    step(other, its_optimizer)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), other.parameters(), strict=True))


@every_policy
@pytest.mark.parametrize("steps", [0, 3])
def test_zeros_are_zeros(policy, steps):
    model, _ = trained(policy, steps=steps)
    nn.init.zeros_(model[0].weight)
    assert not dt.master_weights(model)["0.weight"].any()
    prune.l1_unstructured(model[1], "weight", 0.5)
    prune.remove(model[1], "weight")
    assert (dt.master_weights(model)["1.weight"] == 0).sum() == 15
    assert (dt.uncast(model)[1].weight == 0).sum() == 15


@every_policy
def test_a_loaded_state_dict_is_what_the_next_step_starts_from(policy):
    model, optimizer = trained(policy, "SGD")
    loaded = {name: torch.full_like(value, 0.3) for name, value in model.state_dict().items()}
    model.load_state_dict(loaded)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer)
    for name, master in dt.master_weights(model).items():
        assert torch.equal(master, loaded[name].float())


@every_policy
@pytest.mark.parametrize("name", ["AdamW", "MasterWeights"])
def test_what_is_saved_belongs_to_the_changed_weights(policy, name, tmp_path):
    model, optimizer = trained(policy, name)
    weight = model[0].weight
    under_no_grad(weight)
    masters = dt.master_weights(model)
    tail = storage_of(weight).tail
    dt.save_checkpoint(tmp_path / "saved", model, optimizer)
    states = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), states)
    states.seek(0)
    # saving changes nothing
    assert storage_of(weight).tail is tail
    assert tail.any()
    by_folder, its_optimizer = trained(policy, name, steps=1)
    dt.load_checkpoint(tmp_path / "saved", by_folder, its_optimizer)
    by_torch, another = trained(policy, name, steps=1)
    of_model, of_optimizer = torch.load(states, weights_only=True)
    by_torch.load_state_dict(of_model)
    another.load_state_dict(of_optimizer)
    for each, own in ((by_folder, its_optimizer), (by_torch, another)):
        assert all(torch.equal(masters[key], value) for key, value in dt.master_weights(each).items())
        step(each, own, 5)
    step(model, optimizer, 5)
    masters = dt.master_weights(model)
    for each in (by_folder, by_torch):
        assert all(torch.equal(masters[key], value) for key, value in dt.master_weights(each).items())


@every_policy
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_a_model_and_its_optimizer_are_restored_in_either_order(policy, optimizer_first):
    model, optimizer = trained(policy)
    masters = dt.master_weights(model)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    step(model, optimizer, 9)
    parts = [(model, states[0]), (optimizer, states[1])]
    for part, state in reversed(parts) if optimizer_first else parts:
        part.load_state_dict(state)
    assert all(torch.equal(masters[key], value) for key, value in dt.master_weights(model).items())


@every_policy
def test_duotones_own_writes_are_no_edits(policy):
    model, optimizer = trained(policy)
    masters = {name: value * 1.01 for name, value in dt.master_weights(model).items()}
    dt.load_master_weights(model, masters)
    for _ in range(2):
        # FP16 holds the smallest masters less exactly, once
        held = dt.master_weights(model)
        assert all(torch.allclose(held[key], value, rtol=0, atol=2**-40) for key, value in masters.items())
        step(model, optimizer, 3, found_inf=torch.tensor(True))
    dt.cast(model, policy)
    assert all(torch.equal(held[key], value) for key, value in dt.master_weights(model).items())
    twin = copy.deepcopy(model)
    assert all(torch.equal(held[key], value) for key, value in dt.master_weights(twin).items())
    model[0].to(memory_format=torch.contiguous_format)
    assert all(torch.equal(held[key], value) for key, value in dt.master_weights(model).items())


@every_policy
def test_another_memory_layout_is_no_edit(policy):
    torch.manual_seed(0)
    model = dt.cast(nn.Conv2d(3, 4, 3), policy)
    optimizer = dt.AdamW(model.parameters())
    step(model, optimizer)
    masters = dt.master_weights(model)
    model.to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    assert all(torch.equal(masters[key], value) for key, value in dt.master_weights(model).items())
    # from the next step on edits are noticed again, in this order of memory
    step(model, optimizer)
    masters = dt.master_weights(model)
    model.weight.data[0, 0, 0, 0] = 1.0
    assert has_own_master(model.weight)
    assert torch.equal(dt.master_weights(model)["bias"], masters["bias"])


def both_on_ranks(policy: str, name: str, way: str) -> list[Any]:
    edit = next(each for each in WAYS if each.__name__ == way)
    models = make(policy, 40, 30, shard=True), make(policy, 40, 30)
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in models]
    sharded, alone = models
    differing = []
    for number in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, number)
        masters = {key: value.full_tensor() for key, value in dt.master_weights(sharded).items()}
        expected = dt.master_weights(alone)
        differing += [(number, key) for key, value in expected.items() if not torch.equal(masters[key], value)]
        if number == 1:
            for model in models:
                for param in model.parameters():
                    edit(shards.local(param))
    return differing


@every_policy
@pytest.mark.parametrize("name", ["AdamW", "MasterWeights"])
@pytest.mark.parametrize("way", ["by_data", "under_no_grad"])
def test_two_ranks_follow_as_one_does(ranks, policy, name, way):
    # all weights are halved, whichever rank has them
    assert ranks.run(2, both_on_ranks, policy, name, way) == [[], []]


def wrapped_on_ranks(policy: str, wrapper: str) -> bool:
    torch.manual_seed(0)
    model = dt.cast(nn.Linear(40, 30), policy)
    under_no_grad(model.weight)
    masters = dt.master_weights(model)
    wrapped = getattr(dt, wrapper)(model)
    held = dt.master_weights(getattr(wrapped, "module", wrapped))
    return all(torch.equal(masters[key], getattr(held[key], "full_tensor", lambda k=key: held[k])()) for key in masters)


@every_policy
@pytest.mark.parametrize("wrapper", ["fully_shard", "data_parallel"])
def test_weights_that_were_changed_are_sharded_and_sent_as_they_are(ranks, policy, wrapper):
    assert ranks.run(2, wrapped_on_ranks, policy, wrapper) == [True, True]
