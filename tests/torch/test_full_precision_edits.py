"""What is done to weights in a `full_precision` block is kept bit for bit at its end, whatever it is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.torch.tagger import POLICIES, TOKENS, WITH_MASTERS, Tagger, tagger, train
from torch import nn
from torch.nn.utils import prune

import duotone.torch as dt
from duotone.errors import OptimizerError
from duotone.torch.casting.cast_forward import cast_forward_of
from duotone.torch.parameters.storage import storage_of


def decayed(model: Tagger) -> None:
    for param in model.parameters():
        if param.is_floating_point():
            for _ in range(100):
                param.data.mul_(1 - 1e-5)


def averaged(model: Tagger) -> None:
    with torch.no_grad():
        for param in model.parameters():
            if param.is_floating_point():
                param.lerp_(torch.full_like(param, 0.3), 1e-3)


def pruned(model: Tagger) -> None:
    prune.l1_unstructured(model.hidden, "weight", 0.5)
    prune.remove(model.hidden, "weight")


def replaced_data(model: Tagger) -> None:
    model.hidden.weight.data = model.hidden.weight.data + 1e-4
    model.frozen.weight.data = torch.full((4, 4), 0.1)


def merged(model: Tagger) -> None:
    first, second = torch.linspace(-1, 1, 8).view(4, 2), torch.linspace(-0.1, 0.1, 8).view(2, 4)
    model.frozen.weight.data += 0.5 * first @ second
    model.hidden.weight.data += 0.5 * first @ second


def loaded(model: Tagger) -> None:
    other = Tagger()
    for value in other.state_dict().values():
        value.add_(torch.full_like(value, 1.1).to(value.dtype))
    model.load_state_dict(other.state_dict())


def assigned(model: Tagger) -> None:
    model.load_state_dict({name: value + value for name, value in Tagger().state_dict().items()}, assign=True)
    model.unembed.weight = model.embed.weight


EDITS: list[Callable[[Tagger], None]] = [decayed, averaged, pruned, replaced_data, merged, loaded, assigned]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("edit", EDITS)
def test_what_is_done_inside_is_kept_bit_for_bit(edit: Callable[[Tagger], None], policy: str, same_bits: Any) -> None:
    model, _, scaler = tagger(policy)
    plain = Tagger()
    plain.load_state_dict({**model.state_dict(), **dt.master_weights(model)})
    dtypes = {name: param.dtype for name, param in model.named_parameters()}
    edit(plain)
    with dt.full_precision(model):
        edit(model)
    for name, param in model.named_parameters():
        assert param.dtype == dtypes[name]
        expected = plain.get_parameter(name).float()
        if storage_of(param).rounding is not None:
            expected = expected.to(param.dtype).float()
        elif "fp16" in policy:
            # tails of FP16 weights below 2^-16 are fixed point
            close = dt.master_weights(model)[name] if name != "table" else param.float()
            assert (close - expected).abs().max() <= 2.0**-41
            continue
        assert same_bits(dt.master_weights(model)[name] if name != "table" else param.float(), expected)
    for name, buffer in model.named_buffers():
        assert same_bits(buffer, plain.get_buffer(name))
    assert model.unembed.weight is model.embed.weight
    optimizer = dt.AdamW([p for p in model.parameters() if p.requires_grad], backend="reference")
    train(model, optimizer, scaler)
    assert same_bits(dt.uncast(copy.deepcopy(model)).head.weight, dt.master_weights(model)["head.weight"])


@pytest.mark.parametrize("policy", WITH_MASTERS)
def test_zeros_of_pruning_are_zeros(policy: str) -> None:
    model, _, _ = tagger(policy)
    with dt.full_precision(model):
        pruned(model)
    assert (dt.master_weights(model)["hidden.weight"] == 0).sum() == 8
    assert (dt.uncast(model).hidden.weight == 0).sum() == 8


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_put_into_the_model_is_stored_and_run_by_the_policy(policy: str, same_bits: Any) -> None:
    model, _, scaler = tagger(policy)
    narrow = model.embed.weight.dtype
    wider = torch.cat([dt.master_weights(model)["embed.weight"], torch.full((2, 4), 0.1)])
    with dt.full_precision(model):
        # as resize_token_embeddings does, in both of its ways
        model.embed = nn.Embedding.from_pretrained(wider.clone(), freeze=False)
        model.unembed.weight = model.embed.weight
        model.unembed.out_features = 7
        model.head = nn.Linear(4, 3)
        model.frozen = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)).requires_grad_(False)
        model.hidden.weight.data = torch.full((4, 4), 0.2)
        frozen = {name: value.clone() for name, value in model.frozen.state_dict().items()}
    assert model.embed.weight.dtype == model.frozen[0].weight.dtype == narrow
    assert model.frozen[1].weight.dtype == torch.float32
    assert model.head.weight.dtype == (torch.float32 if "head" in policy else narrow)
    assert model.embed.weight.grad_dtype == storage_of(model.embed.weight).grad
    assert storage_of(model.frozen[0].weight).name == "frozen.0.weight"
    assert cast_forward_of(model.frozen[0]) is not None
    if "true" not in policy:
        assert same_bits(dt.master_weights(model)["embed.weight"], wider)
        assert same_bits(dt.master_weights(model)["frozen.0.weight"], frozen["0.weight"]) or "fp16" in policy
    optimizer = dt.AdamW([p for p in model.parameters() if p.requires_grad], backend="reference")
    train(model, optimizer, scaler)
    with dt.full_precision(model):
        assert {param.dtype for param in model.parameters()} == {torch.float32, torch.int64}
    assert {p.dtype for p in dt.uncast(model).parameters()} == {torch.float32, torch.int64}


def test_a_resized_parameter_keeps_its_place_and_loses_its_gradient() -> None:
    model, optimizer, scaler = tagger("bf16")
    scaler.backward(model(TOKENS))
    param = model.embed.weight
    with dt.full_precision(model):
        param.data = torch.full((6, 4), 0.1)
    assert param.grad is None
    assert storage_of(param).tail.shape == (6, 4)
    assert dt.master_weights(model)["embed.weight"].equal(torch.full((6, 4), 0.1))
    param.grad = torch.zeros(6, 4, dtype=torch.bfloat16)
    with pytest.raises(OptimizerError, match="a parameter that changes its shape needs an optimizer of its own"):
        optimizer.step()


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_a_frozen_weight_gets_a_tail_only_where_it_needs_one(policy: str, tmp_path: Any, same_bits: Any) -> None:
    model, optimizer, _ = tagger(policy)
    with dt.full_precision(model):
        pass
    assert storage_of(model.frozen.weight).tail is None
    before = dt.memory(model, optimizer)
    with dt.full_precision(model):
        model.frozen.weight.data.fill_(0.1)
        model.hidden.weight.requires_grad_(False)
    assert not model.hidden.weight.requires_grad
    assert dt.master_weights(model)["frozen.weight"].equal(torch.full((4, 4), 0.1))
    assert dt.memory(model, optimizer).other_bytes >= before.other_bytes + 32
    dt.save_checkpoint(tmp_path / "saved", model)
    other = dt.cast(Tagger(), policy)
    dt.load_checkpoint(tmp_path / "saved", other)
    assert dt.master_weights(other)["frozen.weight"].equal(torch.full((4, 4), 0.1))


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-true,rounding=stochastic"])
def test_one_module_after_the_other(policy: str, same_bits: Any) -> None:
    model, optimizer, scaler = tagger(policy)
    plain = Tagger()
    plain.load_state_dict({**model.state_dict(), **dt.master_weights(model)})
    for param in plain.parameters():
        param.data.mul_(2)
    seen = set()
    for path, module in dt.full_precision(model).by_module():
        own = [param for param in module.parameters(recurse=False) if param.is_floating_point()]
        assert all(param.dtype == torch.float32 for param in own), path
        narrow = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
        assert len(narrow) >= 4
        for param in own:
            if param not in seen:
                param.data.mul_(2)
        seen.update(own)
    masters = dt.master_weights(model, optimizer)
    for name, master in masters.items():
        expected = plain.get_parameter(name)
        assert same_bits(master, expected) or (policy == "fp16" and (master - expected).abs().max() < 2.0**-40)
    train(model, optimizer, scaler)
    for _ in dt.full_precision(model).by_module():
        break
    assert model.embed.weight.dtype != torch.float32
