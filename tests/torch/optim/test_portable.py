"""The portable form: torch goes on from ours and ours from torch's within two ulps; what does not fit is refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.parameters.storage import storage_of

from .bits import bits_of, everything_of
from .other_optimizers import KINDS

ADAMW = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
NESTEROV = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
PAIRS = [
    pytest.param(partial(dt.AdamW, **ADAMW), partial(torch.optim.AdamW, **ADAMW), id="AdamW"),
    pytest.param(partial(dt.AdamW, maximize=True), partial(torch.optim.AdamW, maximize=True), id="AdamW maximize"),
    pytest.param(partial(dt.SGD, **NESTEROV), partial(torch.optim.SGD, **NESTEROV), id="Nesterov"),
    pytest.param(partial(dt.SGD, lr=0.01), partial(torch.optim.SGD, lr=0.01), id="SGD"),
]
WRAPPED = ["NAdam", "Adafactor", "Adam fused", "AdamW amsgrad", "RMSprop", "SGD momentum", "Adagrad"]
IMPLEMENTATIONS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def linear(policy: str | None = None, outputs: int = 3) -> nn.Linear:
    """Return a layer whose weights are 1 to 2 in size, cast to a policy or not."""
    torch.manual_seed(0)
    model = nn.Linear(4, outputs)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(param.sign())
    return model if policy is None else dt.cast(model, policy)


def step_together(ours: nn.Module, theirs: nn.Module, optimizers, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        grad = torch.randn(own.shape, generator=generator).bfloat16()
        own.grad, other.grad = grad.to(own.grad_dtype), grad.float()
    for optimizer in optimizers:
        optimizer.step()


def within_two_ulps(ours: nn.Module, theirs: nn.Module, ulps) -> bool:
    masters = dt.master_weights(ours)
    return all(ulps(masters[name], weight) <= 2 for name, weight in theirs.named_parameters())


def start_again(ours: nn.Module, theirs: nn.Module) -> None:
    # weights are compared after one step from the same ones, and never small
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.copy_(dt.master_weights(ours)[name])


@pytest.mark.parametrize(("own", "torchs"), PAIRS)
@pytest.mark.parametrize("policy", ["bf16", "fp16", "fp32", "bf16-mixed"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_torch_goes_on_from_ours(train, ulps, own, torchs, policy, implementation):
    ours, theirs = linear(policy), linear()
    optimizer = own(ours.parameters(), lr=2e-3)
    train(optimizer, range(5))
    theirs.load_state_dict(dt.master_weights(ours))
    reference = torchs(theirs.parameters(), lr=0.5)
    reference.load_state_dict(optimizer.portable_state_dict())
    for group in reference.param_groups:
        assert group["lr"] == 2e-3
        group.update(implementation)
    for step in range(10, 20):
        step_together(ours, theirs, (optimizer, reference), step)
        assert within_two_ulps(ours, theirs, ulps)
        start_again(ours, theirs)


@pytest.mark.parametrize(("own", "torchs"), PAIRS)
@pytest.mark.parametrize("policy", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_ours_goes_on_from_torchs(train, ulps, own, torchs, policy, implementation):
    ours, theirs = linear(policy), linear()
    reference = torchs(theirs.parameters(), lr=2e-3, **implementation)
    train(reference, range(5))
    dt.load_master_weights(ours, dict(theirs.named_parameters()))
    optimizer = own(ours.parameters(), lr=0.5, seed=5)
    # something to be replaced
    train(optimizer, range(30, 32))
    dt.load_master_weights(ours, dict(theirs.named_parameters()))
    optimizer.load_portable_state_dict(reference.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3]
    assert optimizer.param_groups[0]["seed"] == 5
    for step in range(10, 20):
        step_together(ours, theirs, (optimizer, reference), step)
        assert within_two_ulps(ours, theirs, ulps)
        start_again(ours, theirs)


def test_a_capturable_state_is_read(train):
    theirs, ours = linear(), linear("bf16")
    reference = torch.optim.AdamW(theirs.parameters())
    train(reference, range(3))
    state = reference.state_dict()
    state["param_groups"][0]["capturable"] = True
    optimizer = dt.AdamW(ours.parameters())
    optimizer.load_portable_state_dict(state)
    assert [optimizer.state[param]["step"].item() for param in ours.parameters()] == [3, 3]
    assert optimizer.param_groups[0].keys() == dt.AdamW(ours.parameters()).param_groups[0].keys()


@pytest.mark.parametrize(("own", "torchs"), PAIRS)
def test_it_holds_what_torchs_own_holds(train, own, torchs):
    ours, theirs = linear("bf16"), linear()
    optimizer, reference = own(ours.parameters()), torchs(theirs.parameters())
    for each in (optimizer, reference):
        train(each, range(2))
    portable, expected = optimizer.portable_state_dict(), reference.state_dict()
    assert [group.keys() for group in portable["param_groups"]] == [group.keys() for group in expected["param_groups"]]
    for ours_group, theirs_group in zip(portable["param_groups"], expected["param_groups"], strict=True):
        assert ours_group == theirs_group
    kinds = [
        {
            index: {
                name: (value.dtype, value.shape, value.device) for name, value in state.items() if value is not None
            }
            for index, state in each["state"].items()
        }
        for each in (portable, expected)
    ]
    assert {index: state for index, state in kinds[1].items() if state} == kinds[0]


def test_running_products_come_from_the_step_count(train):
    theirs, ours = linear(), linear("bf16")
    reference, optimizer = torch.optim.AdamW(theirs.parameters()), dt.AdamW(ours.parameters())
    train(reference, range(7))
    optimizer.load_portable_state_dict(reference.state_dict())
    products = optimizer.state[ours.weight]["beta_products"]
    assert products.dtype == torch.float64
    assert products.tolist() == [0.9**7, 0.999**7]


@pytest.mark.parametrize("make", [dt.AdamW, partial(dt.SGD, momentum=0.9), dt.Lion], ids=["AdamW", "SGD", "Lion"])
def test_moments_are_in_float32_there_and_in_ours_here(train, make):
    ours = linear("bf16,state=bf16")
    optimizer = make(ours.parameters(), lr=0.01)
    train(optimizer, range(3))
    portable = optimizer.portable_state_dict()
    moments = [v for state in portable["state"].values() for key, v in state.items() if key != "step"]
    assert moments
    assert {moment.dtype for moment in moments} == {torch.float32}
    other = make(linear("bf16,state=bf16").parameters(), lr=0.01)
    other.load_portable_state_dict(portable)
    assert bits_of(other.portable_state_dict()) == bits_of(portable)
    names = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
    loaded = [value for state in other.state.values() for name, value in state.items() if name in names]
    assert {moment.dtype for moment in loaded} == {torch.bfloat16}


def test_lion_goes_on_from_its_portable_form(train):
    models = linear("bf16"), linear("bf16")
    optimizers = [dt.Lion(model.parameters(), lr=lr) for model, lr in zip(models, (1e-3, 0.5), strict=True)]
    train(optimizers[0], range(4))
    dt.load_master_weights(models[1], dt.master_weights(models[0]))
    optimizers[1].load_portable_state_dict(optimizers[0].portable_state_dict())
    for optimizer in optimizers:
        train(optimizer, range(4, 7))
    masters = [bits_of(dt.master_weights(model)) for model in models]
    assert masters[0] == masters[1]


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("policy", ["bf16", "fp32"])
def test_a_wrapped_optimizer_goes_on_unwrapped_and_back(train, kind, policy):
    ours, theirs, back = linear(policy), linear(), linear(policy)
    optimizer, reference = dt.MasterWeights(KINDS[kind](ours.parameters())), KINDS[kind](theirs.parameters())
    train(optimizer, range(4))
    theirs.load_state_dict(dt.master_weights(ours))
    reference.load_state_dict(optimizer.portable_state_dict())
    train(optimizer, range(4, 7))
    train(reference, range(4, 7))
    assert bits_of(dt.master_weights(ours)) == bits_of(dict(theirs.named_parameters()))
    again = dt.MasterWeights(KINDS[kind](back.parameters()))
    dt.load_master_weights(back, dict(theirs.named_parameters()))
    again.load_portable_state_dict(reference.state_dict())
    for each in (optimizer, again):
        train(each, range(7, 9))
    assert everything_of(optimizer) == everything_of(again)


def test_a_wrapped_optimizer_keeps_its_implementation(train):
    reference = torch.optim.Adam(linear().parameters(), lr=0.5, foreach=True)
    train(reference, range(2))
    optimizer = dt.MasterWeights(torch.optim.Adam(linear("bf16").parameters(), fused=True))
    optimizer.load_portable_state_dict(reference.state_dict())
    assert {key: optimizer.param_groups[0][key] for key in ("lr", "fused", "foreach")} == {
        "lr": 0.5,
        "fused": True,
        "foreach": None,
    }
    train(optimizer, range(2), found_inf=torch.tensor(False))


def test_state_in_16_bits_becomes_float32_in_a_wrapped_optimizer(train):
    # torch's optimizers keep such state for weights that they update without a master
    reference = torch.optim.Adam(linear().bfloat16().parameters())
    train(reference, range(2))
    model = linear("bf16")
    optimizer = dt.MasterWeights(torch.optim.Adam(model.parameters()))
    optimizer.load_portable_state_dict(reference.state_dict())
    assert {optimizer.state[p]["exp_avg"].dtype for p in model.parameters()} == {torch.float32}


def test_what_never_stepped_has_no_state(train):
    model = linear("bf16")
    optimizer = dt.AdamW(model.parameters())
    assert optimizer.portable_state_dict()["state"] == {}
    train(optimizer, range(1), found_inf=torch.tensor(True))
    assert optimizer.portable_state_dict()["state"] == {}
    # and loading none begins anew, tails and masters as they were
    train(optimizer, range(2))
    masters, tail = bits_of(dt.master_weights(model)), storage_of(model.weight).tail
    optimizer.load_portable_state_dict(torch.optim.AdamW(linear().parameters()).state_dict())
    assert optimizer.state[model.weight].keys() == {"tail"}
    assert optimizer.state[model.weight]["tail"] is tail is storage_of(model.weight).tail
    assert bits_of(dt.master_weights(model)) == masters


@pytest.mark.parametrize("make", [dt.AdamW, lambda params: dt.MasterWeights(torch.optim.AdamW(params))])
def test_a_tail_that_only_the_optimizer_holds_stays(train, make):
    model = linear().bfloat16()
    optimizer = make(model.parameters())
    train(optimizer, range(3))
    masters = bits_of(dt.master_weights(model))
    # torch copies a parameter without what is noted on it
    copied, optimizer = copy.deepcopy((model, optimizer))
    assert storage_of(copied.weight).tail is None
    optimizer.load_portable_state_dict(torch.optim.AdamW(linear().parameters()).state_dict())
    assert bits_of(dt.master_weights(copied)) == masters


def test_what_a_group_holds_besides_goes_along(train):
    reference = torch.optim.AdamW(list(linear().named_parameters()), lr=0.5)
    torch.optim.lr_scheduler.ExponentialLR(reference, 0.9)
    reference.param_groups[0]["mine"] = "kept"
    optimizer = dt.AdamW(linear("bf16").parameters())
    optimizer.load_portable_state_dict(reference.state_dict())
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["mine"], group["param_names"]) == (0.5, "kept", ["weight", "bias"])


def test_what_is_loaded_is_a_copy(train):
    reference = torch.optim.AdamW(linear().parameters())
    train(reference, range(2))
    state = bits_of(reference.state_dict())
    for optimizer in (
        dt.AdamW(linear("bf16").parameters()),
        dt.MasterWeights(torch.optim.AdamW(linear().parameters())),
    ):
        optimizer.load_portable_state_dict(reference.state_dict())
        portable = optimizer.portable_state_dict()
        kept = bits_of(portable)
        train(optimizer, range(2))
        assert bits_of(portable) == kept
    assert bits_of(reference.state_dict()) == state


def state_of(kind, outputs: int = 3, **settings) -> dict:
    optimizer = kind(linear(outputs=outputs).parameters(), **settings)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer.state_dict()


def without(state: dict, name: str) -> dict:
    del state["state"][1][name]
    return state


TORCH = torch.optim
ADAM_MESSAGE = "made with decoupled_weight_decay=False, which has no counterpart in AdamW; allowed is decoupled_w"


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (
            dt.AdamW,
            lambda: state_of(TORCH.AdamW, amsgrad=True),
            "amsgrad=True, which has no counterpart in AdamW; allow",
        ),
        (dt.AdamW, lambda: state_of(TORCH.Adam), ADAM_MESSAGE),
        (
            dt.AdamW,
            lambda: state_of(TORCH.SGD),
            "not one of AdamW: its groups have dampening, momentum, nesterov, those",
        ),
        (
            dt.AdamW,
            lambda: state_of(TORCH.NAdam),
            "not one of AdamW: its groups have betas, eps, momentum_decay, those",
        ),
        (
            dt.AdamW,
            lambda: state_of(TORCH.Adamax),
            r"parameter 0 holds .*exp_inf.* needed is exp_avg \(3, 4\), exp_avg_sq",
        ),
        (dt.AdamW, lambda: state_of(dt.Lion), "the state is one of Duotone's own; load it with load_state_dict"),
        (
            dt.AdamW,
            lambda: state_of(TORCH.AdamW, outputs=2),
            r"parameter 0 holds .*\(2, 4\).* needed is exp_avg \(3, 4\)",
        ),
        (dt.AdamW, lambda: without(state_of(TORCH.AdamW), "step"), "parameter 1 holds .* needed is .* step; load"),
        (
            dt.AdamW,
            lambda: without(state_of(TORCH.AdamW), "exp_avg"),
            "parameter 1 holds exp_avg_sq .* needed is exp_a",
        ),
        (dt.AdamW, dict, 'holds "state" and "param_groups", this one nothing; give what the state_dict'),
        (
            dt.SGD,
            lambda: state_of(TORCH.AdamW),
            "not one of SGD: its groups have betas, eps, those of SGD have dampening",
        ),
        (
            dt.SGD,
            lambda: state_of(TORCH.SGD, outputs=2, momentum=0.9),
            r"holds momentum_buffer float32 \(2, 4\), needed",
        ),
        (dt.SGD, lambda: state_of(TORCH.RMSprop), "not one of SGD: its groups have alpha, eps, momentum, those of SGD"),
        (
            dt.Lion,
            lambda: state_of(TORCH.AdamW),
            "not one of Lion: its groups have betas, eps, those of Lion have betas",
        ),
    ],
)
def test_what_does_not_fit_is_refused_whole(train, make, wrong, message):
    optimizer = make(linear("bf16").parameters(), lr=0.1)
    train(optimizer, range(2))
    before = everything_of(optimizer)
    with pytest.raises(OptimizerError, match=message):
        optimizer.load_portable_state_dict(wrong())
    assert everything_of(optimizer) == before


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("Adam", lambda: state_of(TORCH.AdamW), "with decoupled_weight_decay=True, this Adam has False; load it into"),
        ("Adam", lambda: state_of(TORCH.SGD), "not one of Adam: its groups lack amsgrad, betas, .* and have dampening"),
        (
            "Adam",
            lambda: state_of(TORCH.NAdam),
            "not one of Adam: its groups lack amsgrad and have momentum_decay besid",
        ),
        (
            "Adam",
            lambda: state_of(TORCH.Adam, outputs=2),
            r'"exp_avg" of parameter 0 has shape \(2, 4\) in the state, the',
        ),
        ("Adam", lambda: state_of(TORCH.Adam, amsgrad=True), "holds .*max_exp_avg_sq.* that of Adam exp_avg "),
        ("Adafactor", lambda: state_of(TORCH.Adafactor, outputs=2), r'"row_var" of parameter 0 has shape \(2, 1\)'),
        ("NAdam", lambda: state_of(dt.AdamW), "the state is one of Duotone's own; load it with load_state_dict"),
    ],
)
def test_what_a_wrapped_optimizer_does_not_fit_is_refused_whole(train, kind, wrong, message):
    optimizer = dt.MasterWeights(KINDS[kind](linear("bf16").parameters()))
    train(optimizer, range(2))
    before = everything_of(optimizer)
    with pytest.raises(OptimizerError, match=message):
        optimizer.load_portable_state_dict(wrong())
    assert everything_of(optimizer) == before


def test_other_groups_are_refused():
    model = linear("bf16")
    optimizer = dt.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(OptimizerError, match=r"of parameter groups of \[2\] parameters, this AdamW has \[1, 1\]"):
        optimizer.load_portable_state_dict(state_of(TORCH.AdamW))
    assert bits_of(optimizer.state_dict()) == bits_of(before)
