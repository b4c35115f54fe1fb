"""One call for an existing model and torch optimizer: what is taken over, what is kept, and what is refused whole."""

import warnings

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError, PolicyError
from duotone.torch.casting import half_on_cpu
from duotone.torch.parameters.masters import read_master
from duotone.torch.parameters.storage import storage_of

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
        assert prepared.state[param]["tail"] is storage_of(param).tail
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
    assert (storage_of(model.weight).tail is None) == (policy == "bf16-mixed")


def test_other_optimizers_are_kept_where_weights_are_float32():
    model, optimizer = make(torch.optim.RMSprop)
    prepared = dt.prepare(model, optimizer, "bf16-mixed")
    assert prepared.optimizer is optimizer
    prepared.scaler.backward(model(X).square().mean())
    assert not prepared.scaler.step(optimizer).skipped.item()


class OwnAdamW(torch.optim.AdamW):
    """A subclass, which may change the update."""


OTHERS = [
    (torch.optim.RMSprop, {"momentum": 0.9}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.NAdam, {}),
    (torch.optim.Adafactor, {}),
    (OwnAdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
]


@pytest.mark.parametrize(("kind", "settings"), OTHERS)
@pytest.mark.parametrize("policy", ["bf16", "fp16", "fp32; 0: param=bf16,compute=bf16"])
@pytest.mark.parametrize("steps", [0, 2])
def test_any_other_optimizer_is_wrapped_with_groups_and_state(kind, settings, policy, steps):
    model, optimizer = make(kind, **settings)
    train(model, optimizer, steps)
    masters = [param.detach().clone() for param in model.parameters()]
    state = {index: dict(state) for index, state in optimizer.state_dict()["state"].items()}
    prepared = dt.prepare(model, optimizer, policy)
    assert type(prepared.optimizer) is dt.MasterWeights
    assert prepared.optimizer.optimizer is optimizer
    assert [group["lr"] for group in prepared.optimizer.param_groups] == [0.05, 0.01]
    for index, (param, master) in enumerate(zip(model.parameters(), masters, strict=True)):
        assert torch.equal(read_master(param), master)
        assert (storage_of(param).tail is not None) == (param.dtype != torch.float32)
        for name, value in state.get(index, {}).items():
            assert optimizer.state[param][name] is value
            assert value.dtype == torch.float32
    prepared.scaler.backward(model(X).square().mean() * 1e-3)
    assert not prepared.scaler.step(prepared.optimizer, clip_norm=1.0).skipped.item()
    assert not all(torch.equal(read_master(p), m) for p, m in zip(model.parameters(), masters, strict=True))


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_a_wrapped_optimizer_is_kept(policy):
    model, optimizer = make(torch.optim.NAdam)
    wrapped = dt.MasterWeights(optimizer)
    assert dt.prepare(model, wrapped, policy).optimizer is wrapped
    before = read_master(model[0].weight)
    model(X).square().mean().backward()
    wrapped.step()
    assert not torch.equal(read_master(model[0].weight), before)
    assert storage_of(model[0].weight).tail.any()


@pytest.mark.parametrize(("kind", "name"), [(torch.optim.AdamW, "exp_avg"), (torch.optim.SGD, "momentum_buffer")])
def test_moments_get_the_dtype_of_the_policy(kind, name):
    model, optimizer = make(kind, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    train(model, optimizer, 2)
    expected = [optimizer.state[param][name].bfloat16() for param in model.parameters()]
    prepared = dt.prepare(model, optimizer, "bf16,state=bf16").optimizer
    for param, moment in zip(model.parameters(), expected, strict=True):
        assert torch.equal(prepared.state[param][name], moment)
        assert prepared.state[param][name].dtype == torch.bfloat16


NO_BF16_MOMENTS = "keeps moments in bfloat16, but RMSprop keeps them in float32; use a policy with state=float32"


@pytest.mark.parametrize(
    ("kind", "settings", "policy", "error", "message"),
    [
        (torch.optim.LBFGS, {}, "bf16", OptimizerError, "LBFGS cannot be wrapped in MasterWeights: its step evaluates"),
        (
            torch.optim.SparseAdam,
            {},
            "fp16",
            OptimizerError,
            "SparseAdam cannot be wrapped.*takes sparse gradients only",
        ),
        (torch.optim.RMSprop, {}, "bf16,state=bf16", OptimizerError, NO_BF16_MOMENTS),
        (torch.optim.RMSprop, {}, "fp32,state=bf16", OptimizerError, NO_BF16_MOMENTS),
        (torch.optim.RMSprop, {}, "bf16; 0: state=bf16", OptimizerError, NO_BF16_MOMENTS),
        (torch.optim.AdamW, {}, "bf16; absent: param=fp32,compute=fp32", PolicyError, "holds for no module"),
        (torch.optim.NAdam, {}, "bf16; absent: param=fp32,compute=fp32", PolicyError, "holds for no module"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_unchanged(kind, settings, policy, error, message):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = kind(model.parameters(), **settings)
    with pytest.raises(error, match=message):
        dt.prepare(model, optimizer, policy)
    assert dt.policy_of(model) is None
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    if kind is not torch.optim.LBFGS and kind is not torch.optim.SparseAdam:
        # the optimizer may still be used by itself
        train(model, optimizer, 1)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam])
def test_a_parameter_that_no_master_optimizer_takes_leaves_the_model_unchanged(kind):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).double())
    with pytest.raises(OptimizerError, match=r"cannot update a parameter in torch\.float64"):
        dt.prepare(model, kind(model.parameters()), "bf16")
    assert dt.policy_of(model) is None
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam])
def test_hooks_of_the_step_are_taken_over_and_the_old_optimizer_steps_no_more(kind):
    model = nn.Linear(2, 1)
    first = kind(model.parameters(), lr=0.1)
    calls = []
    first.register_step_pre_hook(lambda *_: calls.append("before"))
    first.register_step_post_hook(lambda *_: calls.append("after"))
    model, optimizer, scaler = dt.prepare(model, first, "bf16")
    scaler.backward(model(torch.ones(1, 2)).sum())
    scaler.step(optimizer)
    assert calls == ["before", "after"]
    with pytest.raises(OptimizerError, match=r"replaced by one with FP32 masters|wrapped in MasterWeights"):
        first.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam, OwnAdamW])
@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed"])
def test_an_optimizer_converted_after_the_cast_is_what_prepare_makes(kind, policy):
    model, optimizer = make(kind)
    train(model, optimizer, 2)
    expected = dt.prepare(model, optimizer, policy).optimizer
    twin, theirs = make(kind)
    train(twin, theirs, 2)
    dt.cast(twin, policy)
    converted = dt.convert_optimizer(theirs)
    assert type(converted) is type(expected)
    assert dt.convert_optimizer(converted) is converted
    for each, stepping in ((model, expected), (twin, converted)):
        train(each, stepping, 2)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(read_master(one), read_master(other))


def test_an_optimizer_of_float32_weights_is_kept_whatever_else_a_rule_says():
    model, optimizer = make(torch.optim.NAdam)
    assert dt.prepare(model, optimizer, "bf16-mixed; 0: output=float32").optimizer is optimizer
    assert dt.convert_optimizer(optimizer) is optimizer


def test_parameters_without_a_shape_get_masters():
    model = dt.cast(nn.Sequential(nn.LazyLinear(3)), "bf16")
    optimizer = dt.convert_optimizer(torch.optim.NAdam(model.parameters(), lr=0.1))
    assert type(optimizer) is dt.MasterWeights
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert storage_of(model[0].weight).tail.any()


def test_moments_that_an_optimizer_does_not_keep_are_refused_after_the_cast():
    model = dt.cast(nn.Linear(2, 1), "fp32,state=bf16")
    with pytest.raises(OptimizerError, match=r"^the policy keeps moments in bfloat16, but NAdam keeps them in float32"):
        dt.convert_optimizer(torch.optim.NAdam(model.parameters()))


def converted_shards() -> list[bool]:
    """Return whether an optimizer of sharded weights, converted, trains them as one that was built from them."""
    masters = []
    for convert in (True, False):
        torch.manual_seed(0)
        model = dt.fully_shard(dt.cast(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), "bf16"))
        kind = torch.optim.AdamW if convert else dt.AdamW
        optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
        train(model, dt.convert_optimizer(optimizer), 3)
        masters.append([master.to_local() for master in dt.master_weights(model).values()])
    return [torch.equal(one, other) for one, other in zip(*masters, strict=True)]


def test_an_optimizer_of_sharded_weights_is_converted(ranks):
    assert ranks.run(2, converted_shards) == [[True] * 4] * 2


def test_warnings_name_the_line_that_calls_prepare(monkeypatch):
    monkeypatch.setattr(half_on_cpu, "cpu_has_half_products", lambda: False)
    half_on_cpu.say_once_how_half_runs_on_cpu.cache_clear()
    frozen, trained = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dt.prepare(nn.Sequential(frozen, trained), torch.optim.NAdam(trained.parameters()), "fp16")
        double = nn.Linear(2, 1).double()
        dt.prepare(double, torch.optim.AdamW(nn.Linear(2, 1).parameters()), "bf16")
    expected = ["frozen weights were rounded", "this CPU has no FP16 matrix products", "no parameter of this Linear"]
    assert [text in str(each.message) for each, text in zip(caught, expected, strict=True)] == [True] * 3
    assert {each.filename for each in caught} == {__file__}
