"""Where masters are kept: tails on their parameters, and the FP32 view of a whole model."""

import math

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.kernels import Rounding
from duotone.torch.parameters.masters import (
    beyond_range,
    ensure_tail,
    needs_tail,
    read_master,
    store_master,
    write_master,
)
from duotone.torch.parameters.storage import Storage, set_storage, storage_of

SPLIT = [torch.bfloat16, torch.float16]


def parameter_in(dtype: torch.dtype, shape: tuple[int, ...] = (3,)) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", SPLIT)
@pytest.mark.parametrize("shape", [(2, 3), (), (0,)])
def test_what_is_written_is_read_back(dtype, shape, same_bits):
    parameter = parameter_in(dtype, shape)
    tail = ensure_tail(parameter)
    master = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    write_master(parameter, master)
    assert same_bits(read_master(parameter), master)
    assert torch.equal(parameter, master.to(dtype))
    assert storage_of(parameter).tail is tail
    assert parameter.requires_grad
    assert not read_master(parameter).requires_grad


def test_a_parameter_without_a_tail_is_its_own_master():
    whole, rounded = parameter_in(torch.float32), parameter_in(torch.bfloat16)
    for parameter in (whole, rounded):
        write_master(parameter, torch.full((3,), 0.1))
        assert storage_of(parameter).tail is None
    assert torch.equal(read_master(whole), torch.full((3,), 0.1))
    assert torch.equal(read_master(rounded), torch.full((3,), 0.1).bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, *SPLIT])
def test_a_master_is_a_new_tensor(dtype):
    parameter = parameter_in(dtype)
    read_master(parameter).add_(1.0)
    assert torch.equal(parameter, torch.ones(3, dtype=dtype))


def test_who_needs_a_tail():
    assert [needs_tail(parameter_in(dtype)) for dtype in (torch.float32, *SPLIT)] == [False, True, True]
    without_master = parameter_in(torch.bfloat16)
    set_storage(without_master, Storage(rounding=Rounding.STOCHASTIC))
    assert not needs_tail(without_master)
    assert storage_of(without_master).rounding == Rounding.STOCHASTIC


def test_the_waiting_tail_comes_before_a_given_one_and_that_before_zeros():
    parameter, given = parameter_in(torch.bfloat16), torch.ones(3, dtype=torch.int16)
    first = ensure_tail(parameter)
    assert torch.equal(first, torch.zeros(3, dtype=torch.int16))
    assert ensure_tail(parameter, given) is first
    set_storage(parameter, Storage())
    assert ensure_tail(parameter, given) is given
    assert storage_of(parameter).tail is given


@pytest.mark.parametrize(
    ("master", "dtype", "expected"),
    [
        (torch.tensor([1.0, -70000.0]), torch.float16, 70000.0),
        (torch.tensor([65520.0]), torch.float16, 65520.0),
        (torch.tensor([65519.996]), torch.float16, None),
        # already infinite: a weight in FP16 shows it as well
        (torch.tensor([math.inf, -math.inf, math.nan, 1.0]), torch.float16, None),
        (torch.empty(0), torch.float16, None),
        (torch.empty(2, device="meta"), torch.float16, None),
        (torch.tensor([3.4e38]), torch.bfloat16, None),
    ],
)
def test_what_float16_cannot_hold(master, dtype, expected):
    assert beyond_range(master, dtype) == expected


class Mixed(nn.Module):
    """Tied, frozen, normalised and integer parameters in one model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.table = nn.Parameter(torch.arange(3), requires_grad=False)


@pytest.mark.parametrize("policy", ["bf16", "fp16", "fp32", "bf16-mixed"])
def test_masters_of_a_model_are_its_float32_weights(policy, same_bits):
    model = Mixed()
    before = {name: param.detach().clone() for name, param in model.named_parameters(remove_duplicate=False)}
    masters = dt.master_weights(dt.cast(model, policy))
    assert list(masters) == ["embedding.weight", "frozen.weight", "norm.weight", "norm.bias", "head.weight"]
    frozen = before["frozen.weight"].to(model.frozen.weight.dtype).float()
    for name, master in masters.items():
        assert same_bits(master, frozen if name == "frozen.weight" else before[name])


def test_weights_rounded_without_a_master_are_their_own_value():
    model = dt.cast(nn.Linear(3, 2), "bf16-true,rounding=stochastic")
    assert torch.equal(dt.master_weights(model)["weight"], model.weight.float())


def test_the_optimizer_of_the_same_model_holds_the_same_tails():
    model = dt.cast(nn.Linear(2, 1), "bf16")
    optimizer = dt.AdamW(model.parameters())
    for parameter in model.parameters():
        assert optimizer.state[parameter]["tail"] is storage_of(parameter).tail
    assert dt.master_weights(model, optimizer).keys() == {"weight", "bias"}


def test_tails_that_are_not_the_models_are_named():
    model = dt.cast(nn.Linear(2, 1), "bf16")
    optimizer = dt.AdamW(model.parameters())
    optimizer.state[model.weight]["tail"] = optimizer.state[model.weight]["tail"].clone()
    with pytest.raises(OptimizerError, match=r'a tail for "weight" that is not the model\'s; build the optimizer from'):
        dt.master_weights(model, optimizer)


@pytest.mark.parametrize("policy", ["bf16", "fp16", "fp32", "bf16-mixed", "bf16-true,rounding=nearest"])
def test_masters_that_are_loaded_are_read_back(policy, same_bits):
    model, other = dt.cast(Mixed(), policy), dt.cast(Mixed(), policy)
    tails = [storage_of(param).tail for param in other.parameters()]
    masters = {name: master * 1.01 + 0.5 for name, master in dt.master_weights(model).items()}
    dt.load_master_weights(model, masters)
    for name, param in model.named_parameters():
        if param.is_floating_point():
            rounded = masters[name] if storage_of(param).tail is not None else masters[name].to(param.dtype).float()
            assert same_bits(read_master(param), rounded)
            assert torch.equal(param, masters[name].to(param.dtype))
    # what master_weights returned is loaded without a loss into a model of the same policy
    dt.load_master_weights(other, dt.master_weights(model))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert all(a is b for a, b in zip(tails, (storage_of(param).tail for param in other.parameters()), strict=True))
    assert model.head.weight is model.embedding.weight


def test_the_optimizer_follows_masters_that_are_loaded(same_bits):
    model = dt.cast(nn.Linear(2, 1, bias=False), "bf16")
    optimizer = dt.SGD(model.parameters(), lr=0.5)
    dt.load_master_weights(model, {"weight": torch.tensor([[0.1, 0.2]])})
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert same_bits(read_master(model.weight), torch.tensor([[0.1, 0.2]]) - 0.5)


def test_a_weight_that_has_no_tail_yet_gets_one(same_bits):
    model = nn.Linear(2, 1, bias=False).bfloat16()
    master = torch.tensor([[0.1, float("nan")]])
    dt.load_master_weights(model, {"weight": master})
    assert same_bits(read_master(model.weight)[0, 0], master[0, 0])
    assert read_master(model.weight)[0, 1].isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masters: masters.pop("norm.bias"), r'the master of "norm\.bias" is missing; give all of them'),
        (
            lambda masters: masters.update(heads=torch.ones(1)),
            'no floating-point parameter "heads"; did you mean head.weight?',
        ),
        (
            lambda masters: masters.update({"norm.bias": torch.ones(5)}),
            r'of "norm\.bias" is torch\.float32 \(5,\); allowed is torch\.float32 \(4,\)',
        ),
        (
            lambda masters: masters.update({"norm.bias": torch.ones(4).double()}),
            r'of "norm\.bias" is torch\.float64 \(4,\); allowed is torch\.float32 \(4,\): give what master_weights',
        ),
        (
            lambda masters: masters["frozen.weight"].fill_(70000.0),
            r'of "frozen\.weight" holds 70000, beyond FP16\'s largest 65504; use policy "bf16"',
        ),
    ],
)
def test_masters_that_do_not_fit_are_refused_whole(change, message, same_bits):
    model = dt.cast(Mixed(), "fp16")
    before = dt.master_weights(model)
    masters = {name: master + 1.0 for name, master in before.items()}
    change(masters)
    with pytest.raises(OptimizerError, match=message):
        dt.load_master_weights(model, masters)
    assert all(same_bits(master, before[name]) for name, master in dt.master_weights(model).items())


def test_a_master_beyond_the_weights_range_is_kept_in_bfloat16(same_bits):
    model = dt.cast(nn.Linear(1, 1, bias=False), "bf16")
    master = torch.tensor([[torch.finfo(torch.float32).max]])
    dt.load_master_weights(model, {"weight": master})
    assert model.weight.isinf().all()
    assert same_bits(read_master(model.weight), master)


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16; head: output=float32"])
def test_state_dict_and_masters_together_are_the_float32_state_dict(policy, same_bits):
    plain, model = Mixed(), Mixed()
    dt.cast(model, policy)
    trained = {name: param + 1e-4 for name, param in plain.named_parameters() if param.is_floating_point()}
    dt.load_master_weights(model, trained)
    model.norm.running_mean.fill_(0.1)
    model.norm.num_batches_tracked.fill_(7)
    masters = dt.master_weights(model)
    # tied ones are tensors of their own, so that whoever averages each in place averages each once
    assert masters["head.weight"] is not masters["embedding.weight"]
    state = {**model.state_dict(), **masters}
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    for name, master in trained.items():
        if name != "frozen.weight":
            assert same_bits(plain.get_parameter(name), master)
    other = dt.cast(Mixed(), policy)
    other.table.data.zero_()
    dt.load_master_weights(other, state)
    for name, value in model.state_dict().items():
        assert same_bits(other.state_dict()[name], value)
    assert all(same_bits(master, dt.master_weights(other)[name]) for name, master in masters.items())


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_a_tied_master_is_given_under_any_of_its_names(policy, same_bits):
    model = dt.cast(Mixed(), policy)
    masters = dt.master_weights(model)
    tied = torch.full((5, 4), 0.1)
    rest = {name: master for name, master in masters.items() if name not in ("embedding.weight", "head.weight")}
    rounded = tied.to(model.embedding.weight.dtype)
    for given in (
        {"embedding.weight": tied},
        {"head.weight": tied},
        {"head.weight": tied.clone(), "embedding.weight": tied},
        {"embedding.weight": rounded, "head.weight": tied},
    ):
        dt.load_master_weights(model, {**rest, **given})
        assert same_bits(read_master(model.head.weight), tied)
        dt.load_master_weights(model, masters)
    with pytest.raises(OptimizerError, match=r'"embedding.weight" and "head.weight" are one tied parameter, but are'):
        dt.load_master_weights(model, {**rest, "embedding.weight": tied, "head.weight": tied + 1.0})


def test_buffers_that_do_not_fit_are_refused():
    model = dt.cast(Mixed(), "bf16")
    masters = dt.master_weights(model)
    for wrong in (torch.zeros(5), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(OptimizerError, match=r'the buffer or parameter "norm.running_mean" is .* allowed is torch'):
            dt.load_master_weights(model, {**masters, "norm.running_mean": wrong})


def test_a_held_tail_of_a_weight_that_was_there_before_is_not_taken():
    model = dt.cast(nn.Linear(3, 2), "bf16")
    optimizer = dt.AdamW(model.parameters(), backend="reference")
    model.float()
    model.weight.data = torch.ones(2, 3, dtype=torch.bfloat16)
    model.weight.grad_dtype = torch.bfloat16
    model.weight.grad = torch.zeros(2, 3, dtype=torch.bfloat16)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    assert torch.equal(read_master(model.weight), torch.ones(2, 3))


def test_a_frozen_weight_gets_a_tail_only_if_it_would_lose_bits(same_bits):
    for dtype in SPLIT:
        parameter = parameter_in(dtype).requires_grad_(False)
        store_master(parameter, torch.full((3,), 0.5), storage_of(parameter))
        assert storage_of(parameter).tail is None
        store_master(parameter, torch.full((3,), 0.1), storage_of(parameter))
        assert same_bits(read_master(parameter), torch.full((3,), 0.1))
