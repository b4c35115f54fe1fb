"""Changes of 16-bit weights by hand, with no step of an optimizer, are warned of; what is put back or set is not."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.errors import DuotoneWarning
from duotone.torch.parameters.foreign_writes import MANY, VERY_MANY, WINDOW

NOT_ONE_BIT = 'other code has written to "0.weight" \\d+ times in a row.* changed not one bit: .*full_precision'
ROUNDED = 'other code has written to "0.weight" \\d+ times in a row.* rounded to .*full_precision'
BY_HAND = 'other code changes 16-bit weights \\("0.weight" is one\\) between forward passes.*AdamW, SGD or Lion'
every_policy = pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1"])


@pytest.fixture(autouse=True)
def nothing_else_warns() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DuotoneWarning)
        warnings.filterwarnings("ignore", "this CPU has no FP16")
        yield


def made(policy: str = "bf16") -> nn.Sequential:
    torch.manual_seed(0)
    return dt.cast(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)), policy)


X = torch.linspace(-1, 1, 64).view(4, 16)


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - 3.0).square().mean()


LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "master_weights": dt.master_weights,
    "full_precision": lambda model: dt.full_precision(model).__enter__(),
    "state_dict": nn.Module.state_dict,
    "export": dt.export,
    "uncast": dt.uncast,
    "cast": lambda model: dt.cast(model, "bf16-mixed"),
    "forward passes": lambda model: [loss_of(model) for _ in range(WINDOW)],
}


@pytest.mark.parametrize("kind", LOOKS)
def test_a_loop_of_decays_that_is_rounded_away_is_said_wherever_masters_are_asked_for(kind):
    model = made()
    with torch.no_grad():
        for _ in range(MANY + 4 * WINDOW):
            torch._foreach_mul_(list(model.parameters()), 1 - 1e-4)
    with pytest.raises(DuotoneWarning, match=NOT_ONE_BIT):
        LOOKS[kind](model)


@every_policy
def test_it_is_said_once_and_of_what_came_after_an_optimizers_steps_too(policy):
    model = made(policy)
    optimizer = dt.SGD(model.parameters(), lr=1e-3, backend="reference")
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
    dt.master_weights(model)
    with torch.no_grad():
        for _ in range(MANY):
            for param in model.parameters():
                param.mul_(1 - 1e-5)
    with pytest.warns(DuotoneWarning, match="changed not one bit") as caught:
        dt.master_weights(model)
    assert [each.filename for each in caught] == [__file__]
    dt.master_weights(model)


@every_policy
def test_a_loop_that_changes_some_weights_is_said_when_it_was_long(policy):
    model = made(policy)
    weight = model[0].weight
    with torch.no_grad():
        for _ in range(VERY_MANY):
            weight.add_(1e-5)
    with pytest.raises(DuotoneWarning, match=ROUNDED):
        dt.master_weights(model)


def sgd(weights: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for weight in weights:
            weight.sub_(1e-2 * weight.grad)


def sgd_by_data(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        weight.data.sub_(1e-2 * weight.grad.data)


def sgd_by_new_data(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        weight.data = weight.data - 1e-2 * weight.grad


class OwnOptimizer:
    """Somebody's own, of none of torch's classes."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights

    def step(self) -> None:
        torch._foreach_add_(self.weights, [weight.grad for weight in self.weights], alpha=-1e-2)


def train(model: nn.Module, step: Callable[[list[nn.Parameter]], None]) -> None:
    for _ in range(5 * WINDOW):
        loss_of(model).backward()
        step(list(model.parameters()))
        model.zero_grad()


STEPS: dict[str, Callable[[Any], None]] = {
    "no_grad": sgd,
    "data": sgd_by_data,
    "new data": sgd_by_new_data,
    "own class": lambda weights: torch.no_grad()(OwnOptimizer(weights).step)(),
}


@every_policy
@pytest.mark.parametrize("kind", STEPS)
def test_training_by_hand_is_said_once(policy, kind):
    model = made(policy)
    with pytest.warns(DuotoneWarning, match=BY_HAND) as caught:
        train(model, STEPS[kind])
    assert [each.filename for each in caught] == [__file__]


@torch.no_grad()
def by_forward_passes(model: nn.Module) -> None:
    """As MeZO does it."""

    def move(seed: int, length: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator).to(param.dtype), alpha=length)

    for seed in range(2 * WINDOW):
        move(seed, 1e-3)
        above = loss_of(model)
        move(seed, -2e-3)
        below = loss_of(model)
        move(seed, 1e-3)
        move(seed, -1e-3 * float(above - below))


def test_training_by_forward_passes_alone_is_said():
    with pytest.raises(DuotoneWarning, match=BY_HAND):
        by_forward_passes(made())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), copy.copy])
def test_copies_are_watched_too(copied):
    model = copied(made())
    with pytest.raises(DuotoneWarning, match=BY_HAND):
        train(model, sgd)


def evaluate_trials(model: nn.Module) -> None:
    before = [param.detach().clone() for param in model.parameters()]
    for number in range(VERY_MANY):
        for param in model.parameters():
            param.add_(0.1 * number)
        if number < 3 * WINDOW // 2:
            # changed weights are as they were at every other look
            loss_of(model)
        for param, own in zip(model.parameters(), before, strict=True):
            param.copy_(own)
        loss_of(model)


def renormalize(model: nn.Module) -> None:
    table = dt.cast(nn.Sequential(nn.Embedding(16, 16, max_norm=0.1), nn.Linear(16, 4)), "bf16")
    for number in range(VERY_MANY):
        table(torch.arange(number % 10, 6 + number % 10))
    dt.master_weights(table)


def load_again(model: nn.Module) -> None:
    states = [made().state_dict(), {name: value / 2 for name, value in model.state_dict().items()}]
    for number in range(VERY_MANY):
        model.load_state_dict(states[number % 2])


def write_in_full_precision(model: nn.Module) -> None:
    with dt.full_precision(model):
        for _ in range(VERY_MANY):
            torch._foreach_mul_(list(model.parameters()), 1 - 1e-4)


def exchange_averages(model: nn.Module) -> None:
    average = dt.Average(model, backend="reference")
    for _ in range(MANY):
        with average.applied(model):
            pass


def load_masters(model: nn.Module) -> None:
    for _ in range(MANY):
        dt.load_master_weights(model, dt.master_weights(model))


def prune(model: nn.Module) -> None:
    for row in range(16):
        model[0].weight[row, ::2] = 0.0


QUIET = [
    evaluate_trials,
    renormalize,
    load_again,
    write_in_full_precision,
    exchange_averages,
    load_masters,
    prune,
]


@every_policy
@pytest.mark.parametrize("kind", QUIET)
def test_what_is_no_small_change_is_not_said(policy, kind, tmp_path: Path):
    model = made(policy)
    with torch.no_grad():
        kind(model)
    dt.master_weights(model)
    dt.export(model, tmp_path / "model.pt")


@pytest.mark.parametrize("micro_batches", [1, 3 * WINDOW])
def test_ordinary_training_is_not_said(micro_batches):
    model = made()
    optimizer = dt.AdamW(model.parameters(), lr=1e-2, backend="reference")
    for number in range(4 * micro_batches if micro_batches > 1 else 5 * WINDOW):
        (loss_of(model) / micro_batches).backward()
        if number % micro_batches == micro_batches - 1:
            optimizer.step()
            optimizer.zero_grad()
    dt.master_weights(model)


def test_weights_that_were_set_once_are_not_said():
    model = made()
    model.load_state_dict({name: value / 2 for name, value in model.state_dict().items()})
    for _ in range(5 * WINDOW):
        loss_of(model).backward()


def test_two_models_that_take_turns_with_one_optimizer_each_are_not_said():
    models = made(), made()
    optimizers = [dt.SGD(model.parameters(), lr=1e-2, backend="reference") for model in models]
    for number in range(5 * WINDOW):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model).backward()
            if number % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()


def test_a_look_costs_no_value_where_versions_and_steps_say_enough(monkeypatch):
    from duotone.torch.parameters import foreign_writes

    model = made().eval()
    monkeypatch.setattr(foreign_writes, "is_edited", lambda _: pytest.fail("values were read"))
    with torch.no_grad():
        for _ in range(5 * WINDOW):
            loss_of(model)


def test_empty_and_lazy_models():
    empty = dt.cast(nn.Sequential(nn.Tanh()), "bf16")
    lazy = dt.cast(nn.Sequential(nn.LazyLinear(3)), "bf16")
    for _ in range(2 * WINDOW):
        empty(X)
        lazy(X)
    assert dt.master_weights(empty) == {}
    dt.master_weights(lazy)


def move_by_hand(model: nn.Module, learner: nn.Module) -> None:
    with torch.no_grad():
        for weight, learned in zip(model.parameters(), learner.parameters(), strict=True):
            weight.lerp_(learned.to(weight.dtype), 0.25)


def move_masters(model: nn.Module, learner: nn.Module) -> None:
    with dt.full_precision(model), dt.full_precision(learner):
        move_by_hand(model, learner)


def learn_by_copies(model: nn.Module, move: Callable[[nn.Module, nn.Module], None], copies: int = 3) -> None:
    for _ in range(copies):
        learner = copy.deepcopy(model)
        optimizer = dt.SGD(learner.parameters(), lr=0.1, backend="reference")
        loss_of(learner).backward()
        optimizer.step()
        move(model, learner)


@every_policy
def test_a_model_that_is_moved_towards_its_copies_is_said_once(policy):
    model = made(policy)
    with pytest.warns(DuotoneWarning, match='"0.weight" is one.*one copy of the model to the next, as Rept') as caught:
        learn_by_copies(model, move_by_hand)
    assert [each.filename for each in caught] == [__file__]
    learn_by_copies(model, move_by_hand)
    learn_by_copies(made(policy), move_masters)


def test_copies_of_a_model_that_was_changed_once_or_trains_are_no_matter():
    model = made()
    with torch.no_grad():
        model[0].weight[:8] = 0
    for _ in range(3):
        copy.deepcopy(model)
    optimizer = dt.SGD(model.parameters(), lr=0.1, backend="reference")
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        with torch.no_grad():
            model[0].weight[:8] = torch.randn(8, 16)
        copy.deepcopy(model)
