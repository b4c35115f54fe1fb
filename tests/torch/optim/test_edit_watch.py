"""Edits that repeat are warned of once, with the way out; ordinary training and single edits are not."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.torch.optim.changed_weights import MARKS, OPTIMIZERS, every_policy, give_gradients, make
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import DuotoneWarning
from duotone.torch.kernels.checksums import CELL
from duotone.torch.optim.edit_watch import WINDOW
from duotone.torch.parameters import shards
from duotone.torch.parameters.storage import storage_of

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:Initializing zero-element")]
every_optimizer = pytest.mark.parametrize("name", ["AdamW", "AdamW, reference", "MasterWeights"])
Edit = Callable[[Tensor, int], Any]


def train(edit: Edit, policy: str = "fp16", name: str = "AdamW", steps: int = 3 * WINDOW, shard: bool = False) -> Any:
    model = make(policy, 8, 6, shard=shard)
    optimizer = OPTIMIZERS[name](model.parameters())
    for number in range(steps):
        give_gradients(model, number)
        with torch.no_grad():
            for param in model.parameters():
                edit(param, number)
        optimizer.step()
    return optimizer


def of_edits(caught: Any) -> list[str]:
    """Return the warnings that are this file's subject."""
    return [str(each.message) for each in caught if "other code" in str(each.message)]


@every_optimizer
def test_ordinary_training_is_never_taken_for_an_edit(name):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(50, 16, padding_idx=0),
            "empty": nn.Linear(0, 3),
            "norm": nn.LayerNorm(16),
            "frozen": nn.Linear(16, 16).requires_grad_(False),
            "head": nn.Linear(16, 50, bias=False),
            "odd": nn.Linear(CELL + 1, 1),
        }
    )
    model["head"].weight = model["embed"].weight
    dt.cast(model, "bf16")
    optimizer = OPTIMIZERS[name]([{"params": list(model.parameters())}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(100):
            if number == 40:
                model["frozen"].requires_grad_(True)
            if number == 60:
                # a weight that is not a number stays one
                masters = dt.master_weights(model)
                masters["odd.bias"].fill_(torch.nan)
                dt.load_master_weights(model, masters)
            hidden = model["norm"](model["embed"](torch.arange(number % 7, 20 + number % 7)).float()).bfloat16()
            loss = model["head"](model["frozen"](hidden)).float().square().mean()
            if number % 3:
                # without a gradient in every third step
                loss = loss + model["odd"](torch.ones(1, CELL + 1, dtype=torch.bfloat16)).float().mean()
            loss.backward()
            optimizer.step(found_inf=torch.tensor(number % 50 == 33))
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            # a cell that is taken for a changed one has no tails any more
            assert all(storage_of(model[name].weight).tail.any() for name in ("embed", "odd"))
    assert not any(seen.item() for seen, _ in optimizer._edits._seen.values())


@every_optimizer
def test_changes_before_every_step_are_warned_of_once(name):
    with pytest.warns(
        DuotoneWarning, match='other code has changed 16-bit weights \\("0.weight" and 2 more\\)'
    ) as caught:
        train(lambda weight, number: weight.data.mul_(1 - 2e-3), name=name)
    (text,) = of_edits(caught)
    assert "full_precision(model)" in text
    assert '"0: param=float32"' in text


def test_a_renormalized_embedding_has_a_way_out(recwarn):
    for policy in ("bf16", "bf16; 0: param=float32"):
        model = dt.cast(nn.Sequential(nn.Embedding(4, 3, max_norm=0.5), nn.Linear(3, 1)), policy)
        optimizer = dt.SGD(model.parameters(), lr=0.5, backend="reference")
        for _ in range(20):
            model(torch.arange(4)).sum().backward()
            optimizer.step()
        texts = of_edits(recwarn)
        assert len(texts) == 1
        assert 'nn.Embedding(max_norm=...) does, keep its weights in FP32, by a rule "0: param=float32"' in texts[0]


@every_optimizer
@every_policy
def test_a_decay_that_is_rounded_away_is_warned_of_once(name, policy):
    with pytest.warns(DuotoneWarning, match="before each of the last 16 steps, and changed not one bit") as caught:
        train(lambda weight, number: weight.mul_(1 - 1e-4), policy, name)
    assert len(of_edits(caught)) == 1


def test_one_parameter_is_named_alone():
    with pytest.warns(DuotoneWarning, match='other code has changed 16-bit weights \\("1.weight"\\) before 16 of 16'):
        train(lambda weight, number: weight.neg_() if weight.shape == (1, 6) else None)


@pytest.mark.parametrize("every", [8, 30])
def test_changes_now_and_then_are_followed_without_a_word(every):
    train(lambda weight, number: None if number % every else weight.copy_(weight.roll(1, -1)))


def test_a_state_dict_that_is_loaded_in_every_step_is_no_matter():
    model = dt.cast(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 1, bias=False)), "bf16")
    optimizer = dt.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3 * WINDOW):
            model(torch.ones(1, 8)).sum().backward()
            model.load_state_dict(model.state_dict())
            optimizer.step()


def test_weights_that_are_exchanged_and_put_back_are_no_matter():
    def exchange(weight: Tensor, number: int) -> None:
        before = weight.detach().clone()
        weight.zero_()
        weight.data = before

    train(exchange)


def warnings_on_ranks(by_data: bool) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DuotoneWarning)
        train(lambda weight, number: (shards.local(weight) if by_data else weight).mul_(1 - 1e-4), "bf16", shard=True)
        train(lambda weight, number: (shards.local(weight) if by_data else weight).mul_(0.99), "bf16", shard=True)
        train(lambda weight, number: None, "bf16", shard=True)
    return of_edits(caught)


def decay_in_full_precision(model: nn.Module) -> None:
    with dt.full_precision(model), torch.no_grad():
        for param in model.parameters():
            param.mul_(1 - 1e-4)


def perturb_and_put_back(model: nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            before = param.clone()
            param.add_(0.1)
            param.copy_(before)


EXACT: dict[str, Callable[[nn.Module], Any]] = {
    "full_precision": decay_in_full_precision,
    "load_master_weights": lambda model: dt.load_master_weights(model, dt.master_weights(model)),
    "sharpness-aware": perturb_and_put_back,
}


@pytest.mark.parametrize("kind", EXACT)
def test_what_loses_nothing_before_every_step_is_not_warned_of(kind):
    torch.manual_seed(0)
    model = dt.cast(nn.Linear(4, 2), "bf16")
    optimizer = dt.AdamW(model.parameters(), backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3 * WINDOW):
            EXACT[kind](model)
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_the_warning_names_the_users_line():
    with pytest.warns(DuotoneWarning, match="and changed not one bit: if it was to change some") as caught:
        train(lambda weight, number: weight.mul_(1 - 1e-4))
    assert [each.filename for each in caught if of_edits([each])] == [__file__]


@pytest.mark.parametrize("by_data", [False, True])
def test_parts_of_a_rank_are_watched(ranks, by_data):
    for messages in ranks.run(2, warnings_on_ranks, by_data):
        first, second = messages
        assert "and changed not one bit" in first
        assert "other code has changed 16-bit weights" in second


def test_a_copy_watches_for_itself():
    optimizer = train(lambda weight, number: weight.mul_(0.5) if number in (20, 21) else None, steps=WINDOW + 8)
    assert optimizer._edits._seen
    assert not copy.deepcopy(optimizer)._edits._seen
