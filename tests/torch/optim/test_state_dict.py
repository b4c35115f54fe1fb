"""State dicts: a run goes on from one bit for bit, and one that does not fit is refused whole."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError

ADAMW = partial(dt.AdamW, lr=0.01)
MOMENTUM = partial(dt.SGD, lr=0.01, momentum=0.9)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
both = pytest.mark.parametrize("make", [ADAMW, MOMENTUM, partial(dt.SGD, lr=0.01)], ids=["AdamW", "momentum", "SGD"])


def linear(policy: str = "bf16", outputs: int = 2) -> nn.Linear:
    torch.manual_seed(0)
    return dt.cast(nn.Linear(4, outputs), policy)


def through_a_state_dict(model, optimizer, make):
    # as a checkpoint without pickle would: the states alone, then the weights
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    loaded = linear(dt.policy_of(model))
    made = make(loaded.parameters(), lr=0.5)
    loaded.load_state_dict(saved["model"])
    made.load_state_dict(saved["optimizer"])
    return loaded, made


@both
@pytest.mark.parametrize("policy", ["bf16", "fp16", "fp32", "bf16,state=bf16", "bf16-true,rounding=stochastic"])
@pytest.mark.parametrize(
    "duplicate",
    [
        through_a_state_dict,
        lambda model, optimizer, make: copy.deepcopy((model, optimizer)),
        lambda model, optimizer, make: copy.deepcopy((optimizer, model))[::-1],
        lambda model, optimizer, make: pickle.loads(pickle.dumps((model, optimizer))),
    ],
    ids=["state_dict", "deepcopy", "deepcopy the other way", "pickle"],
)
def test_a_copy_goes_on_bit_for_bit(train, everything_in, same_everything, make, policy, duplicate):
    model = linear(policy)
    optimizer = make(model.parameters(), seed=7)
    train(optimizer, range(3))
    before = everything_in(optimizer)
    model_copy, optimizer_copy = duplicate(model, optimizer, make)
    train(optimizer_copy, range(3, 6))
    # the copy has its own memory
    assert same_everything(everything_in(optimizer), before)
    train(optimizer, range(3, 6))
    assert same_everything(everything_in(optimizer), everything_in(optimizer_copy))
    copied_masters = dt.master_weights(model_copy, optimizer_copy)
    assert all(torch.equal(copied_masters[name], master) for name, master in dt.master_weights(model).items())


@both
def test_what_is_loaded_is_a_copy(train, everything_in, same_everything, make):
    optimizer, other = make(linear().parameters()), make(linear().parameters())
    train(optimizer, range(2))
    before = everything_in(optimizer)
    other.load_state_dict(optimizer.state_dict())
    train(other, range(2))
    assert same_everything(everything_in(optimizer), before)


def test_settings_come_along():
    model = linear()
    optimizer = ADAMW([{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "betas": (0.5, 0.6)}])
    other = ADAMW([{"params": [model.weight]}, {"params": [model.bias]}])
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.5, 0.01]
    assert other.param_groups[1]["betas"] == (0.5, 0.6)


@pytest.mark.parametrize("frozen_from_the_start", [True, False])
@pytest.mark.parametrize("policy", ["bf16", "fp32"])
def test_a_parameter_frozen_so_far_starts_late(train, everything_in, same_everything, policy, frozen_from_the_start):
    models = linear(policy), linear(policy)
    for model in models:
        model.bias.requires_grad_(not frozen_from_the_start)
    optimizers = [ADAMW(model.parameters()) for model in models]
    for model in models:
        model.bias.requires_grad_(False)
    train(optimizers[0], range(2))
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        model.bias.requires_grad_(True)
        train(optimizer, range(2, 4))
    assert same_everything(everything_in(optimizers[0]), everything_in(optimizers[1]))


def state_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def without_tails() -> dict:
    state = state_of(ADAMW((model := linear()).parameters()), model)
    for of_parameter in state["state"].values():
        del of_parameter["tail"]
    return state


def of_torch(kind: type[torch.optim.Optimizer]) -> dict:
    return state_of(kind((model := nn.Linear(4, 2)).parameters(), lr=0.1), model)


def of_a_parameter_too_many() -> dict:
    state = of_ours(ADAMW)
    state["state"][7] = state["state"][0]
    return state


def of_ours(make, **shape) -> dict:
    return state_of(make((model := linear(**shape)).parameters()), model)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (without_tails, "the state of parameter 0 holds .*beta_products.* AdamW needs .*tail"),
        (lambda: of_torch(torch.optim.AdamW), "not one of Duotone's; AdamW reads .* with load_portable_state_dict"),
        (lambda: of_torch(torch.optim.SGD), "not one of Duotone's; AdamW reads .* with load_portable_state_dict"),
        (lambda: of_ours(MOMENTUM), "the state is one of SGD, not of AdamW"),
        (lambda: of_ours(ADAMW, policy="fp32"), r"of weights in float32, but parameter 0 is in torch\.bfloat16; cast"),
        (lambda: of_ours(ADAMW, policy="fp16"), r"of weights in float16, but parameter 0 is in torch\.bfloat16; cast"),
        (lambda: of_ours(ADAMW, policy="bf16,state=bf16"), r"holds .*exp_avg bfloat16 .* needs .*exp_avg float32"),
        (lambda: of_ours(ADAMW, outputs=3), r"holds .*\(3, 4\).* AdamW needs .*\(2, 4\)"),
        (of_a_parameter_too_many, r"the state is of parameters \[7\], this AdamW has 2"),
        (dict, 'a state dict holds "state" and "param_groups", this one nothing'),
    ],
    ids=[
        "without tails",
        "torch's AdamW",
        "torch's SGD",
        "SGD",
        "fp32",
        "fp16",
        "BF16 moments",
        "another shape",
        "one too many",
        "none at all",
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(train, everything_in, same_everything, wrong, message):
    optimizer = ADAMW(linear().parameters())
    train(optimizer, range(2))
    before, settings = everything_in(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(OptimizerError, match=message):
        optimizer.load_state_dict(wrong())
    assert same_everything(everything_in(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == settings


@pytest.mark.parametrize("layers", [1, 3])
def test_a_state_of_more_or_fewer_parameters_is_refused_whole(train, everything_in, same_everything, layers):
    wrong = dt.cast(nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)]), "bf16")
    model = dt.cast(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "bf16")
    optimizer = ADAMW(model.parameters())
    train(optimizer, range(2))
    before = everything_in(optimizer)
    message = rf"of parameter groups of \[{2 * layers}\] parameters, this AdamW has \[4\]"
    with pytest.raises(OptimizerError, match=message):
        optimizer.load_state_dict(state_of(ADAMW(wrong.parameters()), wrong))
    assert same_everything(everything_in(optimizer), before)


def test_a_cast_after_the_last_step_is_part_of_the_state(train, everything_in, same_everything):
    model, other = linear("bf16"), linear("fp32")
    optimizer, loaded = ADAMW(model.parameters()), ADAMW(other.parameters())
    train(optimizer, range(2))
    dt.cast(model, "fp32")
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    assert same_everything(everything_in(optimizer), everything_in(loaded))


def test_settings_that_decide_what_a_state_holds_come_along(train, everything_in, same_everything):
    models = linear(), linear()
    optimizer, other = MOMENTUM(models[0].parameters()), dt.SGD(models[1].parameters())
    train(optimizer, range(2))
    models[1].load_state_dict(models[0].state_dict())
    other.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        train(each, range(2, 4))
    assert same_everything(everything_in(optimizer), everything_in(other))
