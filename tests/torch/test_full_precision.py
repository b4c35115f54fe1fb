"""`full_precision`: the model's own parameters are their masters for a block; all else is as before afterwards."""

import copy
import io
from typing import Any

import pytest
import torch
from tests.torch.tagger import POLICIES, TOKENS, Tagger, everything, same, tagger, train
from torch import nn

import duotone.torch as dt
from duotone.errors import DuotoneWarning, OptimizerError, PolicyError
from duotone.torch.internals import tensors
from duotone.torch.parameters.storage import storage_of


@pytest.mark.parametrize("policy", POLICIES)
def test_inside_the_models_own_parameters_are_the_masters(policy: str, same_bits: Any) -> None:
    model, optimizer, _ = tagger(policy)
    masters, before = dt.master_weights(model), everything(model, optimizer)
    objects = list(model.parameters())
    places = [(param.data_ptr(), storage_of(param), storage_of(param).tail) for param in objects]
    with dt.full_precision(model) as entered:
        assert entered is model
        assert [id(param) for param in model.parameters()] == [id(param) for param in objects]
        for name, param in model.named_parameters():
            if name != "table":
                assert same_bits(param, masters[name])
                assert param.grad_dtype == torch.float32
        assert model.unembed.weight is model.embed.weight
        assert dt.policy_of(model).for_module("hidden").param == "float32"
        assert dt.memory(model).tails_bytes == 0
        plain = Tagger()
        plain.load_state_dict(model.state_dict())
    assert same(everything(model, optimizer), before, same_bits)
    # the very memory, records and tails
    for param, (address, storage, tail) in zip(model.parameters(), places, strict=True):
        assert (param.data_ptr(), storage_of(param)) == (address, storage)
        assert storage_of(param).tail is tail
    assert dt.policy_of(model) == dt.Policy.parse(policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_training_goes_on_as_if_there_had_been_no_block(policy: str, same_bits: Any) -> None:
    (model, optimizer, scaler), (other, its_optimizer, its_scaler) = tagger(policy), tagger(policy)
    scaler.backward(model(TOKENS))
    its_scaler.backward(other(TOKENS))
    fired: list[str] = []
    model.hidden.weight.register_hook(lambda grad: fired.append("hook"))
    model.hidden.weight.register_post_accumulate_grad_hook(lambda param: fired.append("accumulated"))
    # as DistributedDataParallel waits for gradients
    node = model.hidden.weight.view_as(model.hidden.weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: fired.append("node"))
    grads = [param.grad for param in model.parameters()]
    with dt.full_precision(model):
        assert all(param.grad is None for param in model.parameters())
        with torch.no_grad():
            model.eval()(TOKENS)
        model.train()(TOKENS).backward()
        assert model.hidden.weight.grad.dtype == torch.float32
        with torch.no_grad():
            other(TOKENS)
    for param, grad in zip(model.parameters(), grads, strict=True):
        assert param.grad is grad or param.grad.equal(grad)
    model.norm.load_state_dict(other.norm.state_dict())
    scaler.step(optimizer)
    its_scaler.step(its_optimizer)
    fired.clear()
    train(model, optimizer, scaler)
    train(other, its_optimizer, its_scaler)
    assert sorted(fired) == ["accumulated", "hook", "node"]
    assert same(everything(model, optimizer), everything(other, its_optimizer), same_bits)


@pytest.mark.parametrize(
    ("policy", "mixed"), [("bf16", "bf16-mixed"), ("fp16", "fp16-mixed"), ("bf16; head: output=float32", "bf16-mixed")]
)
def test_forward_passes_inside_keep_the_rules_on_float32_weights(policy: str, mixed: str) -> None:
    model, _, _ = tagger(policy)
    plain = Tagger().eval()
    plain.load_state_dict({**model.state_dict(), **dt.master_weights(model)})
    expected = dt.cast(copy.deepcopy(plain), mixed)(TOKENS)
    with dt.full_precision(model.eval()):
        assert model(TOKENS).equal(expected)
        with dt.full_precision(model, policy=None):
            assert model(TOKENS).equal(plain(TOKENS))
            assert dt.policy_of(model) is None
        assert model(TOKENS).equal(expected)
    with dt.full_precision(model, policy=None):
        assert model(TOKENS).equal(plain(TOKENS))
        model.head.forward = lambda hidden: hidden.sum() * 0
        zero = model(TOKENS)
    assert dt.policy_of(model) == dt.Policy.parse(policy)
    # what was put in front of a forward inside stays
    assert (model(TOKENS) - zero).abs() < 0.1
    with pytest.raises(PolicyError, match=r'allowed are "own", .* and None'):
        dt.full_precision(model, policy="fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_whatever_would_train_or_cast_inside_is_refused(policy: str, same_bits: Any) -> None:
    model, optimizer, scaler = tagger(policy)
    trained = [param for param in model.parameters() if param.requires_grad]
    wrapping = dt.MasterWeights(torch.optim.NAdam(trained))
    before = everything(model, optimizer)
    refused = "are FP32 inside of a full_precision block, which is for reading and editing"
    scaler.backward(model(TOKENS))
    with dt.full_precision(model):
        theirs = torch.optim.SGD(trained, lr=0.1)
        theirs_scaler = dt.GradScaler("cpu")
        for has_gradients in (False, True):
            if has_gradients:
                scaler.backward(model(TOKENS))
            for step in (optimizer.step, wrapping.step, theirs.step, lambda: scaler.step(optimizer)):
                with pytest.raises(OptimizerError, match=refused):
                    step()
        theirs_scaler.scale(model(TOKENS)).backward()
        with pytest.raises(OptimizerError, match=refused):
            theirs_scaler.step(optimizer)
        for verb, call in {
            "cast": lambda: dt.cast(model, policy),
            "uncast": lambda: dt.uncast(model),
            "fully_shard": lambda: dt.fully_shard(model),
            "cast ": lambda: dt.prepare(model, torch.optim.AdamW(trained), policy),
        }.items():
            with pytest.raises(PolicyError, match=f"{verb.strip()} was called inside of a full_precision block"):
                call()
    now = everything(model, optimizer)
    weights = [name for name in before if "norm.r" not in name and "num" not in name]
    assert all(same_bits(before[name], now[name]) for name in weights)
    scaler.step(optimizer)
    wrapping.step()


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_checkpoints_and_optimizer_states_are_refused_inside(policy: str, tmp_path: Any, same_bits: Any) -> None:
    model, optimizer, _ = tagger(policy)
    dt.save_checkpoint(tmp_path / "whole", model, optimizer)
    before, state = everything(model, optimizer), optimizer.state_dict()
    with dt.full_precision(model):
        for verb in ("save_checkpoint", "load_checkpoint"):
            with pytest.raises(PolicyError, match=f"{verb} was called inside of a full_precision block"):
                getattr(dt, verb)(tmp_path / "whole", model, optimizer)
        with pytest.raises(OptimizerError, match="has no masters and fits no model outside"):
            optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert same(everything(model, optimizer), before, same_bits)


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_a_backward_pass_that_comes_after_the_block_is_warned_of(policy: str) -> None:
    model = dt.cast(nn.Linear(2, 1), policy)
    with dt.full_precision(model):
        loss = model(torch.ones(1, 2)).sum()
    with pytest.warns(DuotoneWarning, match="inside of a full_precision block went backward after it") as caught:
        loss.backward()
    assert [each.filename for each in caught] == [__file__]
    assert model.weight.grad is None


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_training_goes_on_after_blocks_in_inference_mode(policy: str) -> None:
    model = dt.cast(nn.Linear(2, 1).requires_grad_(False), policy)
    average = dt.Average(model.requires_grad_(True))
    average.update()
    model.bias.requires_grad_(False)
    with torch.inference_mode():
        with dt.full_precision(model):
            model.bias.add_(1e-6)
        with average.applied(model):
            model(torch.ones(1, 2))
    model.requires_grad_(True)
    optimizer = dt.AdamW(model.parameters(), backend="reference")
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step(grad_multiplier=torch.tensor(1.0))


def test_a_step_of_other_weights_is_none_of_its_business() -> None:
    model, _, _ = tagger("bf16")
    other = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with dt.full_precision(model):
        other(torch.ones(1, 1)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_nest_and_may_raise(policy: str, same_bits: Any) -> None:
    model, optimizer, _ = tagger(policy)
    dtypes = [param.dtype for param in model.parameters()]

    def fail() -> None:
        with dt.full_precision(model):
            with dt.full_precision(model.hidden), dt.full_precision(model):
                model.hidden.weight.data.fill_(0.5)
                assert model.hidden.weight.dtype == torch.float32
            # the outer block is open still
            assert model.hidden.weight.dtype == torch.float32
            model.hidden.weight.data.add_(2.0**-20)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [param.dtype for param in model.parameters()] == dtypes
    if "true" not in policy:
        assert dt.master_weights(model, optimizer)["hidden.weight"].equal(torch.full((4, 4), 0.5 + 2.0**-20))
    with dt.full_precision(model.hidden):
        assert model.hidden.weight.dtype == torch.float32
        assert model.embed.weight.dtype == dtypes[1]
        with dt.full_precision(model):
            assert model.embed.weight.dtype == torch.float32
    assert [param.dtype for param in model.parameters()] == dtypes


def test_values_beyond_float16_leave_the_model_as_it_was(same_bits: Any) -> None:
    model, optimizer, scaler = tagger("fp16")
    scaler.backward(model(TOKENS))
    before, grad = everything(model, optimizer), model.head.weight.grad.clone()

    def overflow() -> None:
        with dt.full_precision(model):
            model.hidden.weight.data.fill_(0.5)
            model.head.weight.data.fill_(70000.0)

    with pytest.raises(PolicyError, match=r'"head.weight" holds 70000, beyond FP16.* what they were before the block'):
        overflow()
    assert same(everything(model, optimizer), before, same_bits)
    assert model.head.weight.grad.equal(grad)
    scaler.step(optimizer)


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_copies_made_inside_are_float32_and_in_no_block(policy: str, same_bits: Any) -> None:
    model, _, scaler = tagger(policy)
    masters = dt.master_weights(model)
    with dt.full_precision(model, policy=None):
        plain = copy.deepcopy(model)
    with dt.full_precision(model):
        mixed = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        pickled = torch.load(file, weights_only=False)
        model.twin = copy.deepcopy(model.hidden)
    assert dt.policy_of(plain) is None
    for each in (plain, mixed, pickled):
        assert not any(storage_of(param).in_full_precision for param in each.parameters())
        assert all(same_bits(each.get_parameter(name), master) for name, master in masters.items())
        train(each, dt.AdamW([p for p in each.parameters() if p.requires_grad], backend="reference"), scaler)
    # a copy of a part is a part
    assert model.twin.weight.dtype == model.hidden.weight.dtype
    assert same_bits(dt.master_weights(model)["twin.weight"], masters["hidden.weight"])
    assert dt.cast(mixed, policy).hidden.weight.dtype == model.hidden.weight.dtype


def test_models_that_were_never_cast_lazy_ones_and_those_without_memory() -> None:
    plain = nn.Linear(2, 2)
    with dt.full_precision(plain):
        assert plain.weight.dtype == torch.float32
    rounded = nn.Linear(2, 2).bfloat16()
    with dt.full_precision(rounded):
        rounded.weight.data.fill_(0.1)
    assert rounded.weight.dtype == torch.bfloat16
    assert dt.master_weights(rounded)["weight"].equal(torch.full((2, 2), 0.1))
    lazy = dt.cast(nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2)), "bf16")
    with dt.full_precision(lazy):
        assert lazy[1].weight.dtype == torch.float32
    assert lazy(torch.ones(1, 3)).shape == (1, 2)
    meta = dt.cast(nn.Linear(2, 2), "bf16").to("meta")
    with dt.full_precision(meta):
        pass
    wrapped = nn.Sequential(dt.cast(nn.Linear(2, 2), "bf16"))
    with dt.full_precision(wrapped):
        wrapped[0].weight = nn.Parameter(torch.full((2, 2), 0.1))
    assert wrapped[0].weight.dtype == torch.bfloat16
    with pytest.raises(PolicyError, match=r"give a torch.nn.Module"):
        dt.full_precision([plain])  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [*POLICIES, "bf16-mixed"])
def test_a_block_that_changes_nothing_may_stand_before_the_backward_pass(policy: str, same_bits: Any) -> None:
    model, _, _ = tagger(policy)
    model(TOKENS).backward()
    expected = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad()
    loss = model(TOKENS)
    versions = {name: param._version for name, param in model.named_parameters()}
    with dt.full_precision(model):
        model.state_dict()
    assert {name: param._version for name, param in model.named_parameters()} == versions
    loss.backward()
    assert all(same_bits(model.get_parameter(name).grad, grad) for name, grad in expected.items())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", ["half", "bfloat16", "double"])
def test_conversions_inside_are_refused(how: str, policy: str, same_bits: Any) -> None:
    model, optimizer, scaler = tagger(policy)
    before = everything(model, optimizer)
    with dt.full_precision(model):
        model.float().to("cpu")
        for part in (model, model.hidden):
            with pytest.raises(PolicyError, match="inside of a full_precision block, at whose end"):
                getattr(part, how)()
        assert all(param.dtype == torch.float32 for param in model.parameters() if param.is_floating_point())
        assert getattr(copy.deepcopy(model), how)().hidden.weight.dtype != torch.float32
    assert same(everything(model, optimizer), before, same_bits)
    train(model, optimizer, scaler)


def test_without_torchs_exchange_of_tensors_all_but_hooks_is_the_same(monkeypatch: Any, same_bits: Any) -> None:
    monkeypatch.setattr(tensors, "_swap", None)
    model, optimizer, scaler = tagger("bf16")
    scaler.backward(model(TOKENS))
    before, grad = everything(model, optimizer), model.head.weight.grad.clone()
    with dt.full_precision(model):
        assert model.head.weight.dtype == torch.float32
        assert model.head.weight.grad is None
    assert same(everything(model, optimizer), before, same_bits)
    assert model.head.weight.grad.equal(grad)
    scaler.step(optimizer)
