"""One call for an existing model and torch optimizer: what is taken over, what is kept, and what is refused whole."""

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError, PolicyError
from duotone.torch.master import read_master, tail_of

KINDS = [
    (torch.optim.AdamW, dt.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}),
    (torch.optim.SGD, dt.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    (torch.optim.SGD, dt.SGD, {}),
]
X = torch.linspace(-1, 1, 24).view(8, 3)


def make(kind: type, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[1].parameters()}]
    return model, kind(groups, lr=0.01, **settings)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("theirs", "ours", "settings"), KINDS)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_float32_run_goes_on_as_torchs(theirs, ours, settings, maximize, steps):
    plain, plain_optimizer = make(theirs, maximize=maximize, **settings)
    train(plain, plain_optimizer, steps + 3)
    model, optimizer = make(theirs, maximize=maximize, **settings)
    train(model, optimizer, steps)
    prepared = dt.prepare(model, optimizer, "fp32")
    assert type(prepared.optimizer) is ours
    assert prepared.model is model
    train(model, prepared.optimizer, 3)
    for param, expected in zip(model.parameters(), plain.parameters(), strict=True):
        # two ulps of numbers from 1/2 to 1, and all are smaller
        assert expected.abs().max() < 1.0
        assert (param - expected).abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("theirs", "ours", "settings"), KINDS)
def test_settings_groups_and_state_are_taken_over(theirs, ours, settings):
    model, optimizer = make(theirs, maximize=True, **settings)
    optimizer.param_groups[0]["initial_lr"] = 0.7
    train(model, optimizer, 2)
    masters = [param.detach().clone() for param in model.parameters()]
    _, prepared, scaler = dt.prepare(model, optimizer, "bf16")
    assert [group["lr"] for group in prepared.param_groups] == [0.05, 0.01]
    assert prepared.param_groups[0]["initial_lr"] == 0.7
    # for groups that are added later
    assert {name: prepared.defaults[name] for name in ("lr", "maximize", *settings)} == {
        "lr": 0.01,
        "maximize": True,
        **settings,
    }
    for group in prepared.param_groups:
        assert {name: group[name] for name in settings} == settings
        assert not {"foreach", "fused", "amsgrad", "capturable"} & group.keys()
    for param, master in zip(model.parameters(), masters, strict=True):
        assert torch.equal(read_master(param), master)
        assert prepared.state[param]["tail"] is tail_of(param)
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            assert (name in prepared.state[param]) == (name in optimizer.state[param])
            if name in optimizer.state[param]:
                assert torch.equal(prepared.state[param][name], optimizer.state[param][name])
        # torch's SGD counts no steps
        assert "step" not in optimizer.state[param] or prepared.state[param]["step"] == 2
    scaler.backward(model(X).square().mean())
    assert not scaler.step(prepared).skipped.item()


def test_the_scaler_fits_the_policy():
    for policy, scale in (("fp16", 2.0**16), ("fp16-mixed,loss_scale=64", 64.0), ("bf16", 1.0)):
        assert dt.prepare(*make(torch.optim.AdamW), policy).scaler.loss_scale.item() == scale


@pytest.mark.parametrize("policy", ["bf16", "bf16-mixed"])
def test_an_optimizer_with_masters_is_kept(policy):
    model = nn.Linear(2, 1)
    optimizer = dt.SGD(model.parameters(), lr=0.5)
    assert dt.prepare(model, optimizer, policy).optimizer is optimizer
    before = read_master(model.weight)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    # it found the tail that the cast left, and the master moved by exactly lr
    assert torch.equal(read_master(model.weight), before - 0.5)
    assert (tail_of(model.weight) is None) == (policy == "bf16-mixed")


def test_other_optimizers_are_kept_where_weights_are_float32():
    model, optimizer = make(torch.optim.RMSprop)
    prepared = dt.prepare(model, optimizer, "bf16-mixed")
    assert prepared.optimizer is optimizer
    prepared.scaler.backward(model(X).square().mean())
    assert not prepared.scaler.step(optimizer).skipped.item()


class OwnAdamW(torch.optim.AdamW):
    """A subclass, which may change the update."""


@pytest.mark.parametrize(
    ("kind", "settings", "policy", "error", "message"),
    [
        (torch.optim.RMSprop, {}, "bf16", OptimizerError, "RMSprop has no counterpart that keeps FP32 masters"),
        (torch.optim.Adam, {}, "fp16", OptimizerError, "Adam has no counterpart that keeps FP32 masters"),
        (OwnAdamW, {}, "bf16", OptimizerError, "OwnAdamW has no counterpart"),
        (torch.optim.RMSprop, {}, "fp32; 0: param=bf16,compute=bf16", OptimizerError, "RMSprop has no counterpart"),
        (torch.optim.AdamW, {"amsgrad": True}, "bf16", OptimizerError, r"AdamW\(amsgrad=True\) has no counterpart"),
        (torch.optim.AdamW, {}, "bf16; absent: param=fp32,compute=fp32", PolicyError, "holds for no module"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_unchanged(kind, settings, policy, error, message):
    model, optimizer = make(kind, **settings)
    with pytest.raises(error, match=message):
        dt.prepare(model, optimizer, policy)
    assert dt.policy_of(model) is None
    assert {param.dtype for param in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_parameter_that_no_master_optimizer_takes_leaves_the_model_unchanged(kind):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).double())
    with pytest.raises(OptimizerError, match=r"cannot update a parameter in torch\.float64"):
        dt.prepare(model, kind(model.parameters()), "bf16")
    assert dt.policy_of(model) is None
    assert model[0].weight.dtype == torch.float32
