"""MasterWeights' state: a run goes on from it bit for bit, checkpoints included; what does not fit is refused whole."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import CheckpointError, OptimizerError
from duotone.torch.parameters.masters import write_master
from duotone.torch.parameters.storage import storage_of

from .bits import everything_of
from .other_optimizers import KINDS

POLICIES = ["bf16", "fp16", "fp32", "bf16-true,rounding=stochastic"]

pytestmark = pytest.mark.usefixtures("poisoned_memory")
some_kinds = pytest.mark.parametrize(
    "kind", ["NAdam", "Adafactor", "Adam fused", "Adagrad", "SGD", "SGD fused", "Recent"]
)


def linear(policy: str = "bf16", outputs: int = 2) -> nn.Linear:
    torch.manual_seed(0)
    return dt.cast(nn.Linear(4, outputs), policy)


def wrapped(model: nn.Module, kind: str = "NAdam", seed: int = 0) -> dt.MasterWeights:
    return dt.MasterWeights(KINDS[kind](model.parameters()), seed=seed)


def through_a_state_dict(model, optimizer, kind):
    # as a checkpoint without pickle would: the states alone, then the weights
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    loaded = linear(dt.policy_of(model))
    made = wrapped(loaded, kind)
    loaded.load_state_dict(saved["model"])
    made.load_state_dict(saved["optimizer"])
    return loaded, made


@some_kinds
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("begun", [0, 3])
@pytest.mark.parametrize(
    "duplicate",
    [
        through_a_state_dict,
        lambda model, optimizer, kind: copy.deepcopy((model, optimizer)),
        lambda model, optimizer, kind: copy.deepcopy((optimizer, model))[::-1],
        lambda model, optimizer, kind: pickle.loads(pickle.dumps((model, optimizer))),
    ],
    ids=["state_dict", "deepcopy", "deepcopy the other way", "pickle"],
)
def test_a_copy_goes_on_bit_for_bit(train, kind, policy, begun, duplicate):
    model = linear(policy)
    optimizer = wrapped(model, kind, seed=7)
    train(optimizer, range(begun), found_inf=torch.tensor(False))
    before = everything_of(optimizer)
    model_copy, optimizer_copy = duplicate(model, optimizer, kind)
    assert type(optimizer_copy.optimizer) is type(optimizer.optimizer)
    # an overflow in the copy's first step as well
    train(optimizer_copy, range(1), found_inf=torch.tensor(True))
    train(optimizer_copy, range(begun, 6), found_inf=torch.tensor(False))
    # the copy has its own memory
    assert everything_of(optimizer) == before
    train(optimizer, range(begun, 6), found_inf=torch.tensor(False))
    assert everything_of(optimizer) == everything_of(optimizer_copy) != before
    masters = dt.master_weights(model_copy, optimizer_copy)
    assert all(torch.equal(masters[name], master) for name, master in dt.master_weights(model).items())


def test_settings_come_along():
    model = linear()
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "betas": (0.5, 0.6)}]
    optimizer = dt.MasterWeights(torch.optim.NAdam(groups), seed=3)
    other = dt.MasterWeights(torch.optim.NAdam([{"params": [model.weight]}, {"params": [model.bias]}]))
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.5, 2e-3]
    assert other.param_groups[1]["betas"] == (0.5, 0.6)
    assert other.seed == 3


def test_nothing_changes_its_dtype_on_loading():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer, other = (dt.MasterWeights(KINDS["Recent"]([weight])) for _ in range(2))
    optimizer.step()
    optimizer.state[weight]["long"] = torch.tensor([1.0], dtype=torch.float64)
    other.load_state_dict(optimizer.state_dict())
    state = other.state[weight]
    assert [state[name].dtype for name in ("codes", "long")] == [torch.int8, torch.float64]
    assert [value.dtype for value in state["last"]] == [torch.float32]
    assert state["count"] == 1
    assert other.state["all"] == {"calls": 1}
    assert other.state["all"] is not optimizer.state["all"]


@pytest.mark.parametrize("kind", ["Adam fused", "SGD fused"])
def test_a_first_step_after_loading_may_overflow(train, kind):
    optimizers = [wrapped(linear(), kind) for _ in range(2)]
    untouched, masters = copy.deepcopy(optimizers[0].state_dict()), dt.master_weights(linear())
    # one is in the midst of training when it is taken back to the beginning
    train(optimizers[0], range(2), found_inf=torch.tensor(False))
    optimizers[0].load_state_dict(untouched)
    for param, master in zip(optimizers[0].param_groups[0]["params"], masters.values(), strict=True):
        write_master(param, master)
    train(optimizers[0], range(1), found_inf=torch.tensor(True))
    for optimizer in optimizers:
        train(optimizer, range(3), found_inf=torch.tensor(False))
    assert everything_of(optimizers[0]) == everything_of(optimizers[1])


def test_moments_are_laid_out_as_their_weight(train):
    weights = [nn.Parameter(torch.ones(3, 4).t()) for _ in range(2)]
    optimizers = [dt.MasterWeights(KINDS["Adam fused"]([weight])) for weight in weights]
    train(optimizers[0], range(2))
    state = optimizers[0].state_dict()
    # as a checkpoint keeps tensors
    state["state"][0] = {key: value.contiguous() for key, value in state["state"][0].items()}
    optimizers[1].load_state_dict(state)
    weights[1].data.copy_(weights[0].data)
    assert optimizers[1].state[weights[1]]["exp_avg"].stride() == weights[1].stride()
    for optimizer in optimizers:
        train(optimizer, range(2, 4))
    assert torch.equal(*weights)


@pytest.mark.parametrize("frozen_from_the_start", [True, False])
@pytest.mark.parametrize("policy", ["bf16", "fp32"])
def test_a_parameter_frozen_so_far_starts_late(train, policy, frozen_from_the_start):
    models = linear(policy), linear(policy)
    for model in models:
        model.bias.requires_grad_(not frozen_from_the_start)
    optimizers = [wrapped(model) for model in models]
    for model in models:
        model.bias.requires_grad_(False)
    train(optimizers[0], range(2))
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        model.bias.requires_grad_(True)
        train(optimizer, range(2, 4))
    assert everything_of(optimizers[0]) == everything_of(optimizers[1])


def stepped(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer.state_dict()


def with_tails(change: Any) -> dict[str, Any]:
    state = stepped(wrapped(linear()))
    for of_parameter in state["state"].values():
        change(of_parameter)
    return state


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: with_tails(lambda state: state.pop("tail")),
            r"parameter 0 holds nothing beside .* needed is tail int16",
        ),
        (
            lambda: with_tails(lambda state: state.update(tail=state["tail"].int())),
            r"holds tail int32 \(2, 4\) beside that of NAdam, needed is tail int16 \(2, 4\)",
        ),
        (
            lambda: stepped(KINDS["NAdam"](linear("fp32").parameters())),
            "not one of Duotone's; MasterWeights reads .*load_p",
        ),
        (lambda: stepped(dt.AdamW(linear().parameters())), "the state is one of AdamW, not of MasterWeights"),
        (lambda: stepped(wrapped(linear(), "Adam")), "the state is one of a wrapped Adam, not of NAdam"),
        (lambda: stepped(wrapped(linear("fp16"))), r"of weights in float16, but parameter 0 is in torch\.bfloat16"),
        (lambda: stepped(wrapped(linear("fp32"))), r"of weights in float32, but parameter 0 is in torch\.bfloat16"),
        (lambda: stepped(wrapped(linear(outputs=3))), r"a weight of shape \(3, 4\), but parameter 0 has \(2, 4\)"),
        (
            lambda: stepped(wrapped(linear("bf16-true,rounding=stochastic"))),
            "holds rounding_step int64 .*needed is tail int16",
        ),
        (
            lambda: stepped(wrapped(nn.Sequential(linear(), linear()))),
            r"groups of \[4\] parameters.*MasterWeights has \[2\]",
        ),
        (dict, 'a state dict holds "state" and "param_groups", this one nothing'),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(train, wrong, message):
    optimizer = wrapped(linear())
    train(optimizer, range(2))
    before = everything_of(optimizer)
    with pytest.raises(OptimizerError, match=message):
        optimizer.load_state_dict(wrong())
    assert everything_of(optimizer) == before


def test_the_count_of_roundings_is_needed(train):
    optimizer = wrapped(linear("bf16-true,rounding=stochastic"))
    train(optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    assert state["state"][0].pop("rounding_step") == 2
    with pytest.raises(OptimizerError, match=r"holds nothing beside .* needed is rounding_step int64"):
        optimizer.load_state_dict(state)


def make(policy: str, kind: str, seed: int = 0):
    torch.manual_seed(seed)
    model = dt.cast(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 2)), policy)
    return model, wrapped(model, kind), dt.LossScaler(policy)


def train_model(parts, steps: int) -> None:
    model, optimizer, scaler = parts
    for _ in range(steps):
        scaler.backward(model(torch.randn(8, 4)).square().mean())
        scaler.step(optimizer, clip_norm=1.0)
        optimizer.zero_grad()


@some_kinds
@pytest.mark.parametrize("policy", POLICIES)
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path, kind, policy):
    parts = make(policy, kind)
    train_model(parts, 3)
    dt.save_checkpoint(tmp_path / "last", *parts)
    train_model(parts, 3)
    other = make(policy, kind, seed=1)
    train_model(other, 2)
    dt.load_checkpoint(tmp_path / "last", *other)
    train_model(other, 3)
    assert everything_of(other[1]) == everything_of(parts[1])


@pytest.mark.parametrize(("saved", "wanted"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "bf16")])
def test_a_checkpoint_is_converted(tmp_path, saved, wanted):
    parts, other = make(saved, "NAdam"), make(wanted, "NAdam", seed=1)
    train_model(parts, 3)
    dt.save_checkpoint(tmp_path / "last", *parts)
    dt.load_checkpoint(tmp_path / "last", *other, convert=True)
    masters = dt.master_weights(other[0], other[1])
    assert all(torch.equal(masters[name], master) for name, master in dt.master_weights(parts[0]).items())
    for one, two in zip(parts[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(parts[1].state[one]["exp_avg"], other[1].state[two]["exp_avg"])
        assert (storage_of(two).tail is not None) == (wanted == "bf16")
    train_model(other, 1)


def test_a_checkpoint_of_another_optimizer_changes_nothing(tmp_path):
    parts, other = make("bf16", "NAdam"), make("bf16", "Adam", seed=1)
    train_model(parts, 1)
    train_model(other, 1)
    dt.save_checkpoint(tmp_path / "last", *parts)
    before = everything_of(other[1])
    with pytest.raises(CheckpointError, match="does not fit: the state is one of a wrapped NAdam, not of Adam"):
        dt.load_checkpoint(tmp_path / "last", *other)
    assert everything_of(other[1]) == before


@pytest.mark.parametrize(("policy", "expected"), [("bf16", 10.0), ("fp32", 12.0), ("bf16-true,rounding=nearest", 8.0)])
def test_its_bytes_are_counted(policy, expected):
    model, _, scaler = make(policy, "SGD")
    optimizer = dt.MasterWeights(torch.optim.RMSprop(model.parameters()))
    train_model((model, optimizer, scaler), 1)
    assert dt.memory(model, optimizer).bytes_per_parameter == expected
