"""Operands are gathered anew whenever one is another or has moved, gradients apart, which none is held of."""

import gc
import re
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.kernels import Rounding
from duotone.torch.optim.gathering import Gathering
from duotone.torch.parameters.storage import Storage, set_storage

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def gathered(monkeypatch) -> Callable[[], int]:
    """Return a function that tells how often operands have been gathered anew."""
    counts = []
    hold = Gathering._hold

    def counting(self, *arguments):
        counts.append(1)
        hold(self, *arguments)

    monkeypatch.setattr(Gathering, "_hold", counting)
    return lambda: len(counts)


def pair(policy: str = "bf16") -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer, twice; the second optimizer never keeps what it has gathered."""
    made = []
    for fresh in (False, True):
        torch.manual_seed(0)
        model = dt.cast(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), policy)
        optimizer = dt.AdamW(model.parameters(), lr=0.01)
        if fresh:
            optimizer.register_step_pre_hook(lambda own, *_: setattr(own, "_gathering", Gathering()))
        made += [model, optimizer]
    return tuple(made)


def on_backends(policy: str) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    """Return a model and its optimizer on the fused backend, and the same on the reference."""
    made = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        model = dt.cast(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), policy)
        made.append((model, dt.AdamW(model.parameters(), lr=0.01, backend=backend)))
    return made


def same(model: nn.Module, other: nn.Module) -> bool:
    masters, expected = dt.master_weights(model), dt.master_weights(other)
    return all(torch.equal(masters[name], expected[name]) for name in expected)


def test_nothing_is_gathered_twice_while_nothing_moves(train, gathered):
    _, optimizer, *_ = pair()
    train(optimizer, range(1))
    assert gathered() == 1
    for _ in range(5):
        optimizer.step()
    assert gathered() == 1


def test_a_step_makes_no_calls_for_a_parameter(calls_in, give_gradients):
    def calls(layers: int) -> int:
        model = dt.cast(nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))), "bf16")
        optimizer, scaler = dt.AdamW(model.parameters()), dt.LossScaler("bf16")
        for step in range(3):
            give_gradients(model.parameters(), step)
            made = calls_in(lambda: scaler.step(optimizer, clip_norm=1.0))
        return made

    # 334 with torch 2.13, whose own around a step are a part of them
    assert calls(2) == calls(30) < 350


@pytest.mark.parametrize("policy", ["bf16", "fp16", "fp32", "bf16-true,rounding=stochastic"])
def test_gradients_may_move_in_every_step(policy, give_gradients, gathered, everything_in, same_everything):
    (model, optimizer), (other, reference) = on_backends(policy)
    kept = []
    for step in range(5):
        for one, own in ((model, optimizer), (other, reference)):
            give_gradients(one.parameters(), step)
            own.step()
        # as long as they are there, those of the next step lie elsewhere
        kept += [parameter.grad for parameter in model.parameters()]
    assert len({grad.data_ptr() for grad in kept}) == len(kept)
    # once for each of the two
    assert gathered() == 2
    assert same_everything(everything_in(optimizer), everything_in(reference))


def leave_out_some(parameters, step):
    for parameter in parameters[step % 4 :: 2]:
        parameter.grad = None


def have_some_in_float32(parameters, step):
    for parameter in parameters[step % 2 :: 2]:
        grad, parameter.grad = parameter.grad, None
        parameter.grad_dtype = torch.float32
        parameter.grad = grad.float() / 3


def transpose_one(parameters, step):
    # between steps in which all lie as they should
    if step % 2:
        parameters[0].grad = parameters[0].grad.t().contiguous().t()


def stretch_one(parameters, step):
    if step % 2:
        parameters[1].grad = torch.stack((parameters[1].grad, parameters[1].grad), -1)[..., 0]


def negate_one_in_name_only(parameters, step):
    if step % 2:
        parameters[0].grad = torch._neg_view(parameters[0].grad)


def share_one(parameters, step):
    parameters[3].grad = parameters[1].grad[:4]


@pytest.mark.parametrize(
    "change", [leave_out_some, have_some_in_float32, transpose_one, stretch_one, negate_one_in_name_only, share_one]
)
def test_whatever_gradients_there_are_the_bits_are_the_references(
    change, give_gradients, everything_in, same_everything
):
    (model, optimizer), (other, reference) = on_backends("bf16")
    for step in range(8):
        for one, own in ((model, optimizer), (other, reference)):
            give_gradients(one.parameters(), step)
            change(list(one.parameters()), step)
            own.step()
            own.zero_grad()
    assert same_everything(everything_in(optimizer), everything_in(reference))


def test_a_gradient_that_has_become_sparse_is_refused(train):
    model, optimizer, *_ = pair("fp32")
    train(optimizer, range(2))
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    with pytest.raises(OptimizerError, match="takes no sparse gradients"):
        optimizer.step()


def test_gradients_are_given_back_between_steps(train):
    model, optimizer, *_ = pair()
    train(optimizer, range(2))
    grads = [weakref.ref(parameter.grad.untyped_storage()) for parameter in model.parameters()]
    optimizer.zero_grad()
    gc.collect()
    assert not any(grad() for grad in grads)


def move_every_weight(model, optimizer):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def move_every_state(model, optimizer):
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.data = tensor.data.clone()


def replace_a_second_moment(model, optimizer):
    state = optimizer.state[model[1].weight]
    state["exp_avg_sq"] = 2.0 * state["exp_avg_sq"]


def replace_a_step_count(model, optimizer):
    state = optimizer.state[model[0].bias]
    state["step"] = state["step"] + 5


def give_a_second_moment_other_data(model, optimizer):
    moment = optimizer.state[model[0].weight]["exp_avg_sq"]
    moment.data = 2.0 * moment


def give_a_tail_other_data(model, optimizer):
    tail = optimizer.state[model[0].weight]["tail"]
    tail.data = tail // 2


def give_a_step_count_other_data(model, optimizer):
    step = optimizer.state[model[0].bias]["step"]
    step.data = step + 5


def share_a_second_moment(model, optimizer):
    optimizer.state[model[0].weight]["exp_avg_sq"].share_memory_()


def load_its_own_state(model, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def cast_there_and_back(model, optimizer):
    # the memory of the old weights may well be that of the new ones
    dt.cast(dt.cast(model, "fp32"), "bf16")


def drop_a_gradient(model, optimizer):
    model[0].weight.grad = None


def widen_a_gradient(model, optimizer):
    parameter = model[0].weight
    grad, parameter.grad = parameter.grad, None
    parameter.grad_dtype = torch.float32
    parameter.grad = grad.float()


def transpose_a_gradient(model, optimizer):
    parameter = model[0].weight
    parameter.grad = parameter.grad.t().contiguous().t()


def add_a_group(model, optimizer):
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    optimizer.add_param_group({"params": [extra], "lr": 0.5})


def forget_everything(model, optimizer):
    optimizer.state.clear()


CHANGES = [
    move_every_weight,
    move_every_state,
    replace_a_second_moment,
    replace_a_step_count,
    give_a_second_moment_other_data,
    give_a_tail_other_data,
    give_a_step_count_other_data,
    share_a_second_moment,
    load_its_own_state,
    cast_there_and_back,
    drop_a_gradient,
    widen_a_gradient,
    transpose_a_gradient,
    add_a_group,
    forget_everything,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_is_noticed(train, give_gradients, change):
    model, optimizer, other, reference = pair()
    for one, own in ((model, optimizer), (other, reference)):
        train(own, range(2))
        give_gradients(one.parameters(), 2)
        change(one, own)
        own.step()
        own.step()
    assert same(model, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def grow(parameter):
    parameter.data = torch.cat((parameter.data, parameter.data))


def shrink_in_place(parameter):
    parameter.data = parameter.data[:2]


@pytest.mark.parametrize("policy", ["bf16", "fp32"])
@pytest.mark.parametrize("change", [grow, shrink_in_place])
def test_a_parameter_that_changed_its_shape_is_refused(train, policy, change):
    model, optimizer, *_ = pair(policy)
    train(optimizer, range(2))
    parameter = model[1].weight
    parameter.grad = None
    change(parameter)
    parameter.grad = torch.ones_like(parameter)
    before = parameter.detach().clone()
    with pytest.raises(OptimizerError, match=r"parameter 2 has shape \(\d, 5\), but its (tail|exp_avg) has \(4, 5\)"):
        optimizer.step()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("shape", [(1,), (6, 5)])
def test_a_gradient_of_another_shape_is_refused(train, shape):
    model, optimizer, *_ = pair()
    train(optimizer, range(2))
    model[0].weight.grad.data = torch.ones(shape, dtype=torch.bfloat16)
    with pytest.raises(
        OptimizerError, match=rf"parameter 0 has shape \(5, 6\), but its gradient has {re.escape(str(shape))}"
    ):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("exp_avg_sq", lambda value: value.bfloat16()),
        ("exp_avg", lambda value: value.double()),
        ("step", lambda value: value.float()),
        ("beta_products", lambda value: value.float()),
    ],
)
def test_a_state_in_another_dtype_is_refused(train, name, change):
    model, optimizer, *_ = pair()
    train(optimizer, range(2))
    state = optimizer.state[model[0].weight]
    state[name] = change(state[name])
    with pytest.raises(OptimizerError, match=r"the state of parameter 0 was changed to .*load_portable_state_dict"):
        optimizer.step()


def test_another_order_is_noticed():
    def run(fresh: bool) -> torch.Tensor:
        weights = [nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
        for weight in weights:
            set_storage(weight, Storage(rounding=Rounding.STOCHASTIC))
        optimizer = dt.SGD(weights, lr=2.0**-9)
        weights[0].grad = torch.ones(500, dtype=torch.bfloat16)
        optimizer.step()
        optimizer.param_groups[0]["params"].reverse()
        if fresh:
            optimizer._gathering = Gathering()
        optimizer.step()
        return weights[0]

    assert torch.equal(run(False), run(True))


def test_another_rounding_is_noticed(train):
    def run(rounding: Rounding) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        set_storage(weight, Storage(rounding=Rounding.NEAREST))
        optimizer = dt.SGD([weight], lr=2.0**-9)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        set_storage(weight, Storage(rounding=rounding))
        optimizer.step()
        return weight

    # 2^-9 is half a step below 1: to nearest nothing moves, and stochastically none of 1000 with probability 2^-1000
    assert (run(Rounding.NEAREST) == 1.0).all()
    assert (run(Rounding.STOCHASTIC) != 1.0).any()


def test_a_momentum_that_is_switched_on_is_noticed(train):
    model, *_ = pair()
    optimizer = dt.SGD(model.parameters(), lr=0.1)
    train(optimizer, range(2))
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    train(optimizer, range(2, 4))
    assert all("momentum_buffer" in optimizer.state[parameter] for parameter in model.parameters())


def test_autograd_sees_that_a_step_has_changed_the_weights(train):
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = dt.AdamW([weight], lr=0.1)
    hidden = weight @ torch.ones(4, requires_grad=True)
    loss = (weight @ hidden).sum()
    train(optimizer, range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_after_the_step_is_as_with_torchs_optimizers(train):
    # also once nothing is gathered anew
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = dt.AdamW([weight], lr=0.1)
    train(optimizer, range(1))
    optimizer.step()
    version = weight._version
    optimizer.step()
    assert weight._version > version
